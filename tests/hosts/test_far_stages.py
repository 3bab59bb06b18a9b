"""Stages on other hosts: who has which, and how results come to host 0, or why they do not."""

import os
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from converters.checkpoint import ShardedCheckpoint
from jaxllm.config import EngineConfig, ParallelConfig
from jaxllm.engine import devices as devices_module
from jaxllm.engine.devices import choose_devices
from jaxllm.parallel import stage_hosts
from jaxllm.parallel.channel import Channel
from jaxllm.parallel.hosts import HostGroup, HostLostError
from jaxllm.parallel.meeting import TUNE_ALONE, find_rank
from jaxllm.parallel.stage_hosts import StageHosts, spread_mesh
from jaxllm.runner import far_stages
from jaxllm.runner.far_stages import FarStages

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def groups() -> Iterator[tuple[HostGroup, HostGroup]]:
    ends = [Channel(end, silence=5) for end in socket.socketpair()]
    yield HostGroup(0, {1: ends[0]}), HostGroup(1, {0: ends[1]})
    for end in ends:
        end.close()


def far(hosts: HostGroup) -> FarStages:
    return FarStages(hosts, 1, entry=None, exit=None)


def test_results_come_in_the_order_in_which_they_were_begun(groups: tuple[HostGroup, HostGroup]) -> None:
    leader, follower = map(far, groups)
    [tokens] = leader.expect(1, 3)
    logprobs = leader.expect(2, 2)
    assert not cast(Any, tokens).is_ready()
    assert len(tokens) == 3
    follower.report((jnp.arange(3),))
    follower.report((jnp.ones(2), jnp.zeros(2, jnp.int32)))
    assert [np.asarray(array).tolist() for array in logprobs] == [[1, 1], [0, 0]]
    assert cast(Any, tokens).is_ready()
    assert np.asarray(tokens).tolist() == [0, 1, 2]
    for one in (leader, follower):
        one.close()


def test_what_has_been_looked_at_is_forgotten(groups: tuple[HostGroup, HostGroup]) -> None:
    """At once, not with the next step: the engine may sleep, and the devices have memory to give back."""

    class Moved:
        def block_until_ready(self) -> None:
            pass

    follower, gone = far(groups[1]), threading.Event()
    moved = Moved()
    weakref.finalize(moved, gone.set)
    follower.watch(cast(Any, moved))
    del moved
    assert gone.wait(5)
    follower.close()


@pytest.mark.parametrize("is_lost", [False, True])
def test_close_waits_for_what_has_begun(is_lost: bool, groups: tuple[HostGroup, HostGroup]) -> None:
    """A process that ended meanwhile might abort; but nobody waits for what a lost host holds up."""
    end, done = threading.Event(), list[str]()

    class Slow:
        def block_until_ready(self) -> None:
            assert end.wait(20)
            done.append("it")

    one = far(groups[1])
    one.watch(cast(Any, Slow()))
    timer = threading.Timer(0.1, lambda: groups[1].lose("gone") if is_lost else end.set())
    timer.start()
    one.close()
    assert done == ([] if is_lost else ["it"])
    timer.join()
    end.set()


def test_who_waits_hears_of_a_lost_host(groups: tuple[HostGroup, HostGroup]) -> None:
    [tokens] = far(groups[0]).expect(1, 3)
    groups[1].lose("it is gone")
    assert groups[0].wait_lost(5)
    assert cast(Any, tokens).is_ready()  # reading does not wait
    for _ in range(2):
        with pytest.raises(HostLostError, match="host 1 is gone"):
            np.asarray(tokens)


def test_a_stage_that_fails_ends_the_group(
    groups: tuple[HostGroup, HostGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a host whose results nobody reads: others would wait for its hidden states."""

    class Failed:
        def block_until_ready(self) -> None:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(far_stages, "REASON_SECONDS", 0.01)
    far(groups[0]).watch(cast(Any, Failed()))
    assert groups[1].wait_lost(5)
    with pytest.raises(HostLostError, match="host 0 has failed: a step failed: out of memory"):
        groups[1].check()


def meshes(*stages: Sequence[int]) -> list[Any]:
    """Of fake devices, by the ranks of their hosts."""
    return [
        SimpleNamespace(devices=np.array([SimpleNamespace(process_index=rank) for rank in ranks]))
        for ranks in stages
    ]


@pytest.mark.parametrize(
    ("stages", "own"),
    [
        ([[0, 0], [1, 1]], {0: [0], 1: [1]}),
        ([[0], [0], [1], [1]], {0: [0, 1], 1: [2, 3]}),
        ([[0, 1], [2, 3]], {0: [0], 1: [0], 2: [1], 3: [1]}),
    ],
)
def test_hosts_have_whole_stages_or_stages_whole_hosts(
    stages: list[list[int]], own: dict[int, list[int]]
) -> None:
    where = StageHosts.of(meshes(*stages))
    assert where.are_several
    assert where.reporter == stages[-1][0]
    assert {rank: [*range(len(stages))][where.own(rank)] for rank in own} == own


@pytest.mark.parametrize(
    "stages", [[[0, 1], [0, 1]], [[0], [0, 1]], [[0, 1], [1]], [[1], [0]], [[0], [1], [0]]]
)
def test_stages_that_cut_hosts_are_refused(stages: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"pipeline_parallel_size=\d: stages would be on hosts"):
        StageHosts.of(meshes(*stages))


@pytest.mark.parametrize(("stages", "flags"), [(1, "--before=1"), (2, f"--before=1 {TUNE_ALONE}")])
def test_hosts_with_stages_of_their_own_tune_programs_alone(
    stages: int, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--before=1")
    address = {"num_hosts": 2, "coordinator_address": "a", "host_rank": 1}
    config = ParallelConfig(pipeline_parallel_size=stages, **address)
    assert [find_rank(config), find_rank(config)] == [1, 1]
    assert os.environ["XLA_FLAGS"] == flags


def test_one_stage_is_on_all_hosts() -> None:
    assert not StageHosts.of(meshes([0, 1])).are_several


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1), "pipeline_parallel_size that is a multiple of 2 or divides it"),
        ((2, 4), "4 devices on each host, and some have only 2"),
    ],
)
def test_hosts_that_cannot_share_evenly_are_refused(
    sizes: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [two] = meshes([0, 0, 1, 1])
    monkeypatch.setattr(stage_hosts.jax, "devices", lambda: list(two.devices))
    with pytest.raises(ValueError, match=message):
        spread_mesh(pipeline=sizes[0], expert=1, tensor=sizes[1])


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake devices of two hosts in place of those that there are."""
    monkeypatch.setattr(devices_module, "_choose_mesh", lambda *_, **__: None)
    monkeypatch.setattr(devices_module, "stage_meshes", lambda _: meshes([0], [1]))
    monkeypatch.setattr(devices_module, "check_hosts", lambda _: None)


@pytest.mark.usefixtures("two_stages")
def test_what_stages_on_several_hosts_cannot_do_is_named(groups: tuple[HostGroup, HostGroup]) -> None:
    config = EngineConfig.create("m", pipeline_parallel_size=2)
    with pytest.raises(ValueError, match=r"pipeline_parallel_size=2: .* set num_hosts"):
        choose_devices(config, None, None)
    counting = EngineConfig.create("m", pipeline_parallel_size=2, expert_metrics=True)
    with pytest.raises(NotImplementedError, match=r"expert_metrics=True: .* leave it out"):
        choose_devices(counting, None, groups[0])

    class Sharded(ShardedCheckpoint):
        def __init__(self) -> None:
            self.path = Path("folder")

    found = choose_devices(config, None, groups[1])
    assert (found.own, found.num_stages) == (slice(1, 2), 2)
    with pytest.raises(NotImplementedError, match=r"model='folder': .* use the safetensors"):
        found.check_checkpoint(Sharded())  # pyright: ignore[reportAbstractUsage]
