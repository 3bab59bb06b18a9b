"""Names of targets, and what is known about them; needs no compiler."""

import pytest

from pallas_kernels.targets import CHIPS, Target


@pytest.mark.parametrize(
    ("name", "full_name", "chips"),
    [
        ("v5e", "v5e:1x1", 1),
        ("v5e:2x4", "v5e:2x4", 8),
        ("V6E:16x16", "v6e:16x16", 256),
        ("v5p:2x2x1", "v5p:2x2x1", 4),
        ("v5p:16x16x24", "v5p:16x16x24", 6144),
        ("h100", "h100", 1),
        ("h100:1", "h100", 1),
        ("h100:8", "h100:8", 8),
    ],
)
def test_names(name: str, full_name: str, chips: int) -> None:
    target = Target.parse(name)
    assert (str(target), target.num_chips) == (full_name, chips)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "no chip 'v9'; there are v5e, v6e, v5p, h100"),
        ("", "no chip ''"),
        ("v5e:3x3", "v5e comes as v5e:1x1, v5e:2x2, v5e:2x4"),
        ("v5p:2x2", "v5p comes as v5p:2x2x1"),
        ("h100:3", "h100 comes as h100:1, h100:2"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target.parse(name)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_facts_are_in_bytes_and_per_chip(chip) -> None:
    assert 0.9 * chip.hbm < chip.usable_hbm < 1.1 * chip.hbm
    assert chip.int8 == pytest.approx(2 * chip.bf16, rel=0.01)
    # a chip that reads all its memory once takes 19 to 37 ms: a unit slipped would show
    assert 0.015 < chip.hbm / chip.bandwidth < 0.04
    for name in chip.slices:
        Target.parse(f"{chip.name}:{name}")
