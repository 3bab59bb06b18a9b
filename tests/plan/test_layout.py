"""How chips are shared out."""

import pytest

from jaxllm.plan.layout import Layout, divisors, find_slice
from pallas_kernels.targets import Target


@pytest.mark.parametrize(
    ("target", "chips", "found"),
    [
        ("v5e:8x8", 16, "v5e:4x4"),
        ("v5e:8x8", 64, "v5e:8x8"),
        ("v5e:8x8", 2, "v5e:2x2"),  # no slice has two chips: the smallest that holds them
        ("v5e:2x4", 2, "v5e:2x2"),
        ("v5p:2x2x4", 8, "v5p:2x2x2"),
        ("v5p:2x2x4", 1, "v5p:2x2x1"),
        ("h100:8", 2, "h100:2"),
    ],
)
def test_a_replica_has_the_most_compact_slice(target: str, chips: int, found: str) -> None:
    assert str(find_slice(Target.parse(target), chips)) == found


def test_all_chips_are_used() -> None:
    layout = Layout.make(Target.parse("v5e:8x8"), 16)
    assert (layout.data_parallel_size, str(layout.replica), layout.torus) == (4, "v5e:4x4", (4, 4))
    assert Layout.make(Target.parse("v5e:8x8"), 1, 16).replica_chips == 16
    assert Layout.make(Target.parse("v5e:2x4"), 2).torus == (2,)
    assert Layout.make(Target.parse("v5p:2x2x1"), 4).torus == (2, 2)


@pytest.mark.parametrize(
    ("target", "tensor", "data", "message"),
    [
        ("v5e:2x4", 3, None, "tensor_parallel_size=3: must divide the 8 chips of v5e:2x4, as 1, 2, 4, 8 do"),
        ("v5e:2x4", 4, 3, "data_parallel_size=3: .* data_parallel_size=2 uses all"),
        ("h100:16", 16, None, "tensor_parallel_size=16: .* within a host's 8 chips"),
    ],
)
def test_sizes_that_do_not_go_together(target: str, tensor: int, data: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.make(Target.parse(target), tensor, data=data)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
