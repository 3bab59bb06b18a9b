"""How chips are shared out."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxllm.plan.layout import Layout, divisors, find_slice
from jaxllm.plan.placement import stage_hops, stage_places, stage_torus
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
    assert (layout.data_parallel_size, str(layout.replica)) == (4, "v5e:4x4")
    assert Layout.make(Target.parse("v5e:8x8"), 1, 16).replica_chips == 16


def test_stages_share_a_replica() -> None:
    layout = Layout.make(Target.parse("v5e:4x4"), 2, pipeline=2)
    assert (layout.stage_chips, layout.replica_chips, layout.data_parallel_size) == (2, 4, 4)
    assert str(layout.replica) == "v5e:2x2"
    assert "tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=4" in str(layout)
    assert Layout.make(Target.parse("v5e:2x4"), 2, pipeline=4).data_parallel_size == 1
    for target in ("v5p:2x2x2", "v5e:4x4"):  # slices of one host have up to 8 v5e, hosts of larger ones 4
        with pytest.raises(ValueError, match=f"pipeline_parallel_size=2: .* a host of {target} has 4 chips"):
            Layout.make(Target.parse(target), 4, pipeline=2)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=1 \* pipeline_parallel_size=3: must divide"):
        Layout.make(Target.parse("v5e:2x2"), 1, pipeline=3)


def test_data_groups_share_a_replica() -> None:
    layout = Layout.make(Target.parse("v5e:2x4"), 2, data_parallel_experts=True)
    assert (layout.num_groups, layout.group_chips, layout.stage_chips) == (4, 2, 8)
    assert (layout.num_replicas, layout.num_chips, str(layout.replica)) == (1, 8, "v5e:2x4")
    assert str(layout).endswith("tensor_parallel_size=2, data_parallel_size=4, data_parallel_experts")
    for target, sizes, message in (
        ("v5e:2x4", {"tensor": 8}, "data_parallel_experts=True: all 8 chips of v5e:2x4 make one data group"),
        ("v5e:2x4", {"tensor": 2, "pipeline": 2}, "pipeline_parallel_size=2: must be 1 with data_parallel"),
        ("v5e:4x4", {"tensor": 1}, "data_parallel_size=16: .* a host of v5e:4x4 has 4 chips"),
        ("h100:16", {"tensor": 1}, "data_parallel_size=16: .* a host of h100:16 has 8 chips"),
    ):
        with pytest.raises(ValueError, match=message):
            Layout.make(Target.parse(target), **sizes, data_parallel_experts=True)


def test_places_of_stages() -> None:
    """Four stages of two chips, which are columns of a slice of 2 by 4."""
    devices = [SimpleNamespace(id=10 + 4 * x + y, coords=(x, y, 0)) for y in range(4) for x in range(2)]
    meshes: Any = [SimpleNamespace(devices=np.array(devices[i : i + 2])) for i in range(0, 8, 2)]
    places = stage_places(meshes, (2, 4))
    assert places[1] == [(0, 1), (1, 1)]
    assert stage_torus(places[1]) == (2,)
    assert (stage_hops(places[0], places[1]), stage_hops(places[3], places[0])) == (1, 3)
    assert stage_torus([(0, 0), (1, 0), (0, 2)]) == (3,)
    for shape, torus in (((4, 4), (4, 4)), ((2, 2, 1), (2, 2)), ((1, 1), ())):  # stages that are whole slices
        assert stage_torus(list(np.ndindex(shape))) == torus
    without: Any = [SimpleNamespace(devices=np.array([SimpleNamespace(id=i)])) for i in (4, 5)]
    assert stage_places(without, (2,)) == [[(0,)], [(1,)]]


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
