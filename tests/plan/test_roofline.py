"""Times at best, checked by hand."""

import pytest

from jaxllm.plan.roofline import GPU_BASE_SECONDS, GPU_HOP_SECONDS, Links, Work, transfer_seconds
from pallas_kernels.targets import CHIPS, Target
from pallas_kernels.targets.compiled import Traffic


def test_a_part_takes_what_it_has_more_of() -> None:
    chip = CHIPS["v5e"]
    assert Work(197e12, 1.0).seconds(chip) == pytest.approx(1.0)
    assert Work(1.0, 819e9).seconds(chip) == pytest.approx(1.0)
    assert Work(1.0, 2.0) + Work(3.0, 4.0) == Work(4.0, 6.0)


def test_an_all_reduce_on_a_plane_without_wraparound() -> None:
    links = Links.of(Target.parse("v5e:2x4"), (2, 4), 8)
    # 50 GB/s each way on a link, one link of each axis at an end; 1 hop and 3 hops
    assert (links.bandwidth, links.hops) == (pytest.approx(100e9), 4)
    seconds = links.seconds({"all-reduce": Traffic(1, 100_000_000)})
    assert seconds == pytest.approx(2 * 7 / 8 * 1e-3 + 2 * 4e-6)


def test_axes_that_wrap_around_have_twice_the_links() -> None:
    assert Links.of(Target.parse("v5e:16x16"), (16, 16), 256).bandwidth == pytest.approx(200e9)
    assert Links.of(Target.parse("v5p:4x4x4"), (4, 4, 4), 64).bandwidth == pytest.approx(600e9)
    assert Links.of(Target.parse("v5p:2x2x4"), (2, 2, 4), 16).bandwidth == pytest.approx(300e9)


def test_collectives_on_a_gpu_host() -> None:
    links = Links.of(Target.parse("h100:4"), (4,), 4)
    traffic = {"all-gather": Traffic(2, 450_000_000), "reduce-scatter": Traffic(1, 150_000_000)}
    latency = 3 * (GPU_BASE_SECONDS + 3 * GPU_HOP_SECONDS)
    assert links.seconds(traffic) == pytest.approx((0.75 + 1.0) * 1e-3 + latency)


def test_experts_rows_are_as_many_as_come_and_not_as_there_is_room_for() -> None:
    links = Links.of(Target.parse("v5e:2x4"), (2, 4), 8, 8)
    rows = 8_000_000  # bytes of a step, of which each chip sends an eighth, and gets it back
    seconds = links.seconds({"ragged-all-to-all": Traffic(2, rows + rows // 8)})
    assert seconds == pytest.approx(2 * 1e6 / 100e9 + 2 * 4e-6)


def test_transfers_between_stages_share_links() -> None:
    """A link of v5e takes 50 GB/s each way, and each one carries what the chips of `hops` rows send."""
    target = Target.parse("v5e:2x4")
    assert transfer_seconds(target, 50_000_000, 1) == pytest.approx(1e-3 + 1e-6)
    assert transfer_seconds(target, 50_000_000, 2) == pytest.approx(2e-3 + 2e-6)
    latency = GPU_BASE_SECONDS + GPU_HOP_SECONDS
    assert transfer_seconds(Target.parse("h100:4"), 450_000_000, 3) == pytest.approx(1e-3 + latency)


def test_a_chip_alone_sends_nothing() -> None:
    assert Links.of(Target.parse("v5e"), (), 1).seconds({}) == 0.0


def test_unknown_collectives_are_refused() -> None:
    with pytest.raises(ValueError, match="collective-broadcast: no such collective"):
        Links.of(Target.parse("h100:2"), (2,), 2).seconds({"collective-broadcast": Traffic(1, 1)})
