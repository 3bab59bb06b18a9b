"""The messages between hosts, and the group that hosts make: whole, bounded, and quick to fall apart."""

import socket
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxllm import EngineConfig
from jaxllm.config import ParallelConfig
from jaxllm.engine.hosting import host_facts
from jaxllm.parallel import hosts as hosts_module
from jaxllm.parallel import make_mesh
from jaxllm.parallel.channel import Channel, ChannelClosedError, Message
from jaxllm.parallel.hosts import HostGroup, HostLostError
from jaxllm.parallel.meeting import MeetingError, meet
from jaxllm.runner.calls import dispatch_message, read_dispatch, read_sample, sample_message
from jaxllm.runner.hosts import LeadingRunner, agree_on_pages, follow
from jaxllm.runner.programs import Programs
from jaxllm.runner.runner import Admission, BegunStep, DispatchedStep, Runner
from jaxllm.sampling import SamplingParams
from jaxllm.sampling.settings import row_settings
from jaxllm.sampling.state import SamplerConfig
from jaxllm.scheduler.plan import PageUpdate, RowPlan, StepPlan


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, two = (Channel(end, silence=5) for end in socket.socketpair())
    yield one, two
    one.close()
    two.close()


def test_messages_arrive_as_they_were_sent(pair: tuple[Channel, Channel]) -> None:
    arrays = [
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.array(2.5, np.float32),
        np.zeros((0, 4), np.uint32),
        np.array([True, False]),
    ]
    pair[0].send(Message("any", {"x": [1, None, "ü"]}, arrays))
    pair[0].send(Message("next"))
    found = pair[1].receive()
    assert (found.kind, found.fields) == ("any", {"x": [1, None, "ü"]})
    for got, sent in zip(found.arrays, arrays, strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(got, sent)
    assert pair[1].receive() == Message("next", {}, [])


@pytest.mark.parametrize(
    "params", [{}, {"presence_penalty": 1.0, "logit_bias": {3: 1.0}, "temperature": 0.5}]
)
def test_steps_arrive_as_they_were_sent(params: dict[str, Any], pair: tuple[Channel, Channel]) -> None:
    settings = row_settings(SamplerConfig(50), SamplingParams(**params), seed=2**60, prompt_token_ids=[1, 2])
    rows = (RowPlan("a", 3, 0, 2, True), RowPlan("b", 0, 7, 1, False))
    plan = StepPlan(rows, ("a",), (PageUpdate(3, 0, 0, (4, 5)), PageUpdate(0, 1, 2, (6,))))
    returned = [np.array([7, 8], np.int32), np.array([9], np.int32)]
    pair[0].send(dispatch_message(plan, {3: Admission((7, 8), settings)}, 16, returned))
    found, admissions, bucket, came = read_dispatch(pair[1].receive())
    assert bucket == 16
    assert [tokens.tolist() for tokens in came] == [[7, 8], [9]]
    assert found.rows == tuple(row._replace(request_id="") for row in rows)
    assert found.page_updates == plan.page_updates
    [(row, admission)] = admissions.items()
    assert (row, list(admission.token_ids)) == (3, [7, 8])
    assert (admission.settings.tables is None) == (not params)
    np.testing.assert_equal(vars(admission.settings.scalars), vars(settings.scalars))
    if admission.settings.tables is not None and settings.tables is not None:
        np.testing.assert_equal(vars(admission.settings.tables), vars(settings.tables))


def test_a_step_without_news_arrives(pair: tuple[Channel, Channel]) -> None:
    plan = StepPlan((RowPlan("", 1, 5, 1, True),))
    pair[0].send(dispatch_message(plan, {}, 2))
    assert read_dispatch(pair[1].receive()) == (plan, {}, 2, [])


def test_masks_of_a_step_arrive(pair: tuple[Channel, Channel]) -> None:
    words = np.array([[1, 2**31], [0, 2**32 - 1]], np.uint32)
    pair[0].send(sample_message(((3, 1), words)))
    pair[0].send(sample_message(None))
    found = read_sample(pair[1].receive())
    assert found is not None
    assert tuple(found[0]) == (3, 1)
    np.testing.assert_array_equal(found[1], words)
    assert read_sample(pair[1].receive()) is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\2" + b"\0" * 8 + b"{}",
        b'\0\0\0\x14\0\0\0\0\0\0\0\x08["x",{},[["|O",[1]]]]' + b"\0" * 8,
        b'\0\0\0\x14\0\0\0\0\0\0\0\x01["x",{},[["i4",[9]]]]' + b"\0",
        b"\0\0",
    ],
    ids=["another protocol", "no message", "objects", "too few bytes", "half of a size"],
)
def test_what_is_no_message_closes_the_channel(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, silence=5)
    theirs.sendall(data)
    theirs.close()
    with pytest.raises(ChannelClosedError):
        channel.receive()
    channel.close()


def test_silence_closes_a_channel() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, silence=0.05)
    with pytest.raises(ChannelClosedError, match=r"nothing for 0\.05 s"):
        channel.receive()
    channel.close()
    theirs.close()


def groups(pair: tuple[Channel, Channel]) -> tuple[HostGroup, HostGroup]:
    return HostGroup(0, {1: pair[0]}), HostGroup(1, {0: pair[1]})


def test_hosts_agree_or_say_on_what_they_do_not(pair: tuple[Channel, Channel]) -> None:
    leader, follower = groups(pair)
    found: list[Any] = []

    def other(facts: dict[str, Any]) -> None:
        try:
            found.append(follower.agree(facts, {"num_pages": 7}))
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=other, args=({"model": "a"},))
    thread.start()
    assert leader.agree({"model": "a"}, {"num_pages": 9}) == {"num_pages": 7}
    thread.join()
    thread = threading.Thread(target=other, args=({"model": "b"},))
    thread.start()
    with pytest.raises(ValueError, match="model is 'b' on host 1 and 'a' on host 0"):
        leader.agree({"model": "a"}, {"num_pages": 9})
    thread.join()
    assert found[0] == {"num_pages": 7}
    assert "model is 'b'" in found[1]


def test_a_silent_host_is_lost(monkeypatch: pytest.MonkeyPatch, pair: tuple[Channel, Channel]) -> None:
    """As one whose machine is gone: the connection stays open, and nobody says a word."""
    monkeypatch.setattr(hosts_module, "HEARTBEAT", 0.02)
    pair[0].set_silence(0.2)
    told = threading.Event()
    leader = HostGroup(0, {1: pair[0]})
    leader.when_lost(told.set)
    assert told.wait(5)
    with pytest.raises(HostLostError, match=r"host 1 is gone: it has said nothing for 0\.2 s"):
        leader.send(Message("step"))
    with pytest.raises(HostLostError):
        leader.receive(1)
    late = threading.Event()
    leader.when_lost(late.set)
    assert late.is_set()


def test_who_asks_just_as_a_host_is_lost_is_told_once(pair: tuple[Channel, Channel]) -> None:
    leader, _ = groups(pair)
    told: list[int] = []

    class LosesAtTheEnd:
        """A lock after whose first use the host is lost, as if by another thread."""

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            leader._losing = threading.Lock()
            leader.lose("host 1 is gone")

    leader._losing = LosesAtTheEnd()  # pyright: ignore[reportAttributeAccessIssue]
    leader.when_lost(lambda: told.append(1))
    assert told == [1]


def test_experts_move_on_all_hosts(pair: tuple[Channel, Channel]) -> None:
    class Stage:
        def __init__(self) -> None:
            self.moved: list[tuple[int, list[int]]] = []

        def move_experts(self, layer: int, experts: np.ndarray) -> None:
            self.moved.append((layer, experts.tolist()))

        def free(self) -> None:
            pass

    (leading, following), first, second, programs = groups(pair), Stage(), Stage(), Programs({})
    leader = LeadingRunner([cast(Any, first)], 2, programs, cast(Any, None), leading)
    leader.move_experts(0, 1, np.array([2, 0, 1, 0]))
    leader.close()
    follow(Runner([cast(Any, second)], 2, programs, cast(Any, None)), following)
    assert first.moved == second.moved == [(1, [2, 0, 1, 0])]


def test_who_follows_keeps_nothing_of_a_step_while_it_sleeps(pair: tuple[Channel, Channel]) -> None:
    """Its logits would stay on the devices."""
    plan, kept = StepPlan((RowPlan("", 1, 5, 1, True),)), list[bool]()

    class Following:
        lowering = SimpleNamespace(buckets=SimpleNamespace(sizes=[None]))

        def dispatch(self, *_: Any, **__: Any) -> BegunStep:
            begun = BegunStep(plan, (), 0.0)
            self.begun = weakref.ref(begun)
            return begun

        def sample(self, *_: Any) -> DispatchedStep:
            step = DispatchedStep(plan, None, cast(Any, None), 0.0, (), ())
            self.step = weakref.ref(step)
            return step

        def sleep(self, *, keep_weights: bool) -> None:
            kept.append(keep_weights)
            kept.extend(found() is not None for found in (self.begun, self.step))

        def close(self) -> None:
            pass

    leading, following = groups(pair)
    for message in (dispatch_message(plan, {}, 0), sample_message(None)):
        leading.send(message)
    leading.send(Message("sleep", {"keep_weights": True}))
    leading.close()
    follow(cast(Any, Following()), following)
    assert kept == [True, False, False]


def test_hosts_with_other_meshes_are_refused(pair: tuple[Channel, Channel]) -> None:
    """As where host 0 has been given one of somebody's own: the others go by the config."""
    (leader, follower), found = groups(pair), list[str]()
    lowering = cast(
        Any,
        SimpleNamespace(
            model="m",
            sizes="s",
            backend=SimpleNamespace(name="xla"),
            products=None,
            sampler=SimpleNamespace(processors=()),
        ),
    )

    def other() -> None:
        with pytest.raises(ValueError, match="the mesh is ") as error:
            agree_on_pages(follower, lowering, {}, make_mesh(devices=jax.devices()[:1]), 9)
        found.append(str(error.value))

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(ValueError, match=r"the mesh is .* on host 1 and .* on host 0"):
        agree_on_pages(leader, lowering, {}, make_mesh(devices=jax.devices()[1:2]), 9)
    thread.join()
    assert found


def test_what_goes_to_several_hosts_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[str] = []
    encode = hosts_module.encode

    def counting(message: Message) -> bytes:
        packed.append(message.kind)
        return encode(message)

    monkeypatch.setattr(hosts_module, "encode", counting)
    ends = [tuple(Channel(end, silence=5) for end in socket.socketpair()) for _ in range(3)]
    leader = HostGroup(0, {rank: ours for rank, (ours, _) in enumerate(ends, 1)})
    leader.send(Message("step"))
    assert [theirs.receive().kind for _, theirs in ends] == ["step"] * 3
    assert packed == ["step"]
    leader.lose("done")
    for _, theirs in ends:
        theirs.close()


def test_a_host_that_fails_says_why(pair: tuple[Channel, Channel]) -> None:
    leader, follower = groups(pair)
    follower.fail("out of memory")
    with pytest.raises(HostLostError, match="host 1 has failed: out of memory"):
        leader.receive(1)
    assert follower.lost is not None


def test_hosts_that_do_not_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    config = {"num_hosts": 3, "coordinator_address": f"127.0.0.1:{port}"}
    with pytest.raises(MeetingError, match=rf"host 0 is not at 127\.0\.0\.1:{port}"):
        meet(ParallelConfig(**config, host_rank=1), {}, seconds=0.1)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(MeetingError, match="cannot listen at"):
        meet(ParallelConfig(**config), {}, seconds=0.1)
    stranger: list[bytes] = []

    def visit() -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    stranger.append(connection.recv(100))
                return
            except ConnectionRefusedError:
                time.sleep(0.01)

    thread = threading.Thread(target=visit)
    thread.start()
    with pytest.raises(MeetingError, match="num_hosts=3: host 1, 2 did not come in time"):
        meet(ParallelConfig(**config), {}, seconds=1)
    thread.join()


def test_facts_leave_out_what_hosts_may_differ_in() -> None:
    def facts(**options: Any) -> dict[str, Any]:
        address = {"num_hosts": 2, "coordinator_address": "a"}
        return host_facts(EngineConfig.create(options.pop("model", "m"), **address, **options))

    assert facts() == facts(host_rank=1, model="/elsewhere/m", progress=False, token="x")
    assert facts()["jax"]
    for option in ({"page_size": 8}, {"tensor_parallel_size": 2}, {"seed": 1}):
        assert facts(**option) != facts()


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("host", ("host", 29501)),
        ("host:7", ("host", 7)),
        ("10.0.0.1:70", ("10.0.0.1", 70)),
        ("[::1]:8", ("::1", 8)),
        ("::1", ("::1", 29501)),
    ],
)
def test_addresses(address: str, found: tuple[str, int]) -> None:
    assert ParallelConfig(num_hosts=2, coordinator_address=address).coordinator == found
