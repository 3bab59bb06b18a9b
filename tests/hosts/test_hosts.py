"""Several hosts, as processes with gloo between them: the tokens of one, and an end in order."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from host_processes import ENGINE, HostProcess, flags, hosts
from small import OPTIONS
from small_text import text_checkpoint

from jaxllm import Engine, SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.usefixtures("quick_compile")

PROMPTS = ["abc", "the quick brown fox", "1 2 3 4 5 6 7 8 9 10 11 12"]
SAMPLED: dict[str, Any] = {
    "prompt": PROMPTS,
    "n": 2,
    "temperature": 1.0,
    "seed": 5,
    "max_tokens": 12,
    "ignore_eos": True,
    "presence_penalty": 0.3,
    "logprobs": 1,
    "echo": True,
}
"""Runs every program: admissions with and without tables, sampler, logprobs, scores of prompts."""
HELD: dict[str, Any] = {
    "prompt": PROMPTS,
    "temperature": 1.0,
    "seed": 5,
    "max_tokens": 30,
    "structured_outputs": {"regex": "[a-f]{3,9}(-[0-9]{2}){1,3}"},
}
"""Runs what loads masks."""
SERVE_TIMEOUT = 150


PLAIN: dict[str, Any] = {
    "prompt": PROMPTS,
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
    "echo": True,
}
"""Needs half as many programs."""


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    """One host with one device."""
    with Engine.from_pretrained(str(model), **(OPTIONS | ENGINE | {"skip_tokenizer_init": False})) as found:
        yield found


def expected(engine: Engine, body: dict[str, Any]) -> list[str]:
    wanted = {key: value for key, value in body.items() if key not in ("prompt", "echo")}
    if (held := wanted.get("structured_outputs")) is not None:
        wanted["structured_outputs"] = StructuredOutputsParams(**held)
    outputs = engine.generate(PROMPTS, SamplingParams(**wanted))
    return [
        (prompt if body.get("echo") else "") + sample.text
        for prompt, output in zip(PROMPTS, outputs, strict=True)
        for sample in output.outputs
    ]


def serve(model: Path, **options: Any) -> list[str]:
    return ["serve", str(model), *flags(port=0, admin=True, **(ENGINE | options))]


def url_of(leader: HostProcess) -> str:
    line = leader.wait_for("running on")
    leader.wait_for("ready:")
    return next(word for word in line.split() if word.startswith("http://"))


def texts(url: str, body: dict[str, Any]) -> list[str]:
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=SERVE_TIMEOUT)
    assert answer.is_success, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def test_the_same_tokens_as_one_host(model: Path, engine: Engine) -> None:
    """Also after a sleep that keeps the weights in each host's memory, and one that drops them."""
    with hosts(serve(model, tensor_parallel_size=4), 2, devices=2) as (leader, follower):
        url = url_of(leader)
        assert texts(url, SAMPLED) == expected(engine, SAMPLED)
        assert texts(url, HELD) == expected(engine, HELD)
        for level in (1, 2):
            assert httpx2.post(f"{url}/sleep?level={level}", timeout=30).is_success
            assert httpx2.post(f"{url}/wake_up", timeout=60).is_success
        assert texts(url, SAMPLED) == expected(engine, SAMPLED)
        follower.process.send_signal(signal.SIGTERM)
        follower.wait_for("this host ends when host 0 does")
        assert texts(url, PLAIN) == expected(engine, PLAIN)
        leader.process.send_signal(signal.SIGTERM)
        assert [leader.wait(30), follower.wait(30)] == [0, 0]


def test_hosts_with_several_stages(tmp_path: Path) -> None:
    """Random weights of a model with experts, the same on all hosts; also after each kind of sleep."""
    model = text_checkpoint(tmp_path / "model", model="mixtral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    options = ENGINE | {"load_format": "dummy"}
    with Engine.from_pretrained(str(model), **(OPTIONS | options | {"skip_tokenizer_init": False})) as alone:
        wanted = {id(body): expected(alone, body) for body in (SAMPLED, HELD)}
    command = serve(model, load_format="dummy", pipeline_parallel_size=4)
    with hosts(command, 2, devices=2) as (leader, follower):
        url = url_of(leader)
        assert texts(url, SAMPLED) == wanted[id(SAMPLED)]
        assert texts(url, HELD) == wanted[id(HELD)]
        for level in (1, 2):
            assert httpx2.post(f"{url}/sleep?level={level}", timeout=30).is_success
            assert httpx2.post(f"{url}/wake_up", timeout=60).is_success
        assert texts(url, SAMPLED) == wanted[id(SAMPLED)]
        leader.process.send_signal(signal.SIGTERM)
        assert [leader.wait(30), follower.wait(30)] == [0, 0]


def test_four_hosts_and_one_is_lost(model: Path, engine: Engine) -> None:
    """Two stages, each on two hosts. Requests that run end with an error, and so do all hosts within 30 s."""
    body = {"prompt": "abc", "max_tokens": 80, "ignore_eos": True, "stream": True}
    command = serve(model, pipeline_parallel_size=2, tensor_parallel_size=2)
    with hosts(command, 4) as (leader, *followers), ExitStack() as stack:
        url = url_of(leader)
        assert texts(url, PLAIN) == expected(engine, PLAIN)
        streams = [
            stack.enter_context(
                httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=SERVE_TIMEOUT)
            ).iter_lines()
            for _ in range(2)
        ]
        for lines in streams:
            next(lines)
        followers[1].process.kill()
        begin = time.monotonic()
        for lines in streams:
            *_, error, _ = [line for line in lines if line]
            assert "error" in json.loads(error.removeprefix("data: ")), error
        assert leader.wait(30) == 1
        for other in (followers[0], followers[2]):
            assert other.wait(30) in (1, -signal.SIGABRT)
        assert time.monotonic() - begin < 30
        leader.wait_for("host 2 is gone")
        assert not any("start over" in line for line in leader.log)  # nothing could


def test_followers_end_when_host_0_is_gone(model: Path) -> None:
    command = serve(model, tensor_parallel_size=2)
    with hosts(command, 2) as (leader, follower):
        url_of(leader)
        leader.process.kill()
        # jax's runtime sees it at the same time, and may be quicker to end the process: by SIGABRT
        assert follower.wait(30) in (1, -signal.SIGABRT)
        assert any("host 0 is gone" in line or "distributed service" in line for line in follower.log)


def test_who_does_not_fit_is_refused_and_the_right_one_is_taken(model: Path) -> None:
    command = serve(model, tensor_parallel_size=2)
    with hosts(command, 2, differently={1: ["--page-size", "8", "--dtype", "bfloat16"]}) as (leader, other):
        assert other.wait(60) == 1
        line = other.wait_for("host 0 has refused this host")
        assert "page_size is '8' on host 1" in line
        assert "'4' on host 0" in line
        assert "dtype is 'bfloat16'" in line
        leader.wait_for("a host is refused")
        assert leader.process.poll() is None


def test_what_is_seen_late_ends_both(model: Path, tmp_path: Path) -> None:
    """Another model on one of the hosts, and devices that leave one of them without work."""
    other = text_checkpoint(tmp_path / "other", model="qwen3")
    command = ["generate", str(model), "abc", *flags(**ENGINE, tensor_parallel_size=2)]
    with hosts(command, 2, models={1: other}) as (leader, follower):
        assert leader.wait(60) == 1
        assert follower.wait(30) in (1, -signal.SIGABRT)
        leader.wait_for("the model is ")
        follower.wait_for("on host 1 and ")
    command = ["generate", str(model), "abc", *flags(**ENGINE, tensor_parallel_size=1)]
    with hosts(command, 2) as (leader, follower):
        assert leader.wait(60) == 1
        assert follower.wait(30) in (1, -signal.SIGABRT)
        leader.wait_for("none on host 1 would be used")


def test_generate_on_two_hosts(model: Path) -> None:
    """The same command on both, each with a stage on two devices, which ends on both when it is done."""
    argv = ["generate", str(model), "abc", "xyz", "--json", "--seed", "5", "--max-tokens", "3"]
    sizes = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    with hosts([*argv, *flags(**ENGINE, **sizes)], 2, devices=2) as (leader, follower):
        assert leader.wait(150) == 0
        assert follower.wait(30) == 0
        answers = [json.loads(line) for line in leader.log if line.startswith("{")]
        assert [len(answer["outputs"][0]["token_ids"]) for answer in answers] == [3, 3]
        assert not any(line.startswith("{") for line in follower.log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hosts": 2}, "coordinator_address=None: must be given"),
        ({"num_hosts": 2, "coordinator_address": "a", "host_rank": 2}, r"host_rank=2: must be 0 to 1"),
        ({"num_hosts": -1}, "num_hosts=-1"),
        ({"num_hosts": 2, "coordinator_address": "a", "data_parallel_size": 2}, "engine for each replica"),
        (
            {"num_hosts": 2, "coordinator_address": "a", "pipeline_parallel_size": 3},
            "pipeline_parallel_size=3: must be a multiple of num_hosts=2 or divide it",
        ),
        (
            {"num_hosts": 0, "pipeline_parallel_size": 2, "enable_eplb": True},
            "enable_eplb=True: must be left out with stages on several hosts",
        ),
        ({"coordinator_port": 0}, "coordinator_port=0"),
        (
            {"num_hosts": 2, "coordinator_address": "a", "host_rank": 1},
            "host_rank=1: an engine is made on host 0",
        ),
        ({"ray_resources": {"TPU": 4}}, "ray_resources"),
        ({"distributed_executor_backend": "uni"}, "distributed_executor_backend='uni'"),
        ({"distributed_executor_backend": "ray", "num_hosts": 0}, "num_hosts=0: must be a count with Ray"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained("x", **options)
