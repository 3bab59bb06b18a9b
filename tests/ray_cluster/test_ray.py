"""With real Ray: hosts that it starts, and replicas that it serves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from host_processes import ENGINE, flags, host_process
from small import OPTIONS

from jaxllm import Engine, EngineConfig, SamplingParams
from jaxllm.engine import ray_hosts

# Ray is no friend of warnings as errors: its own imports and sockets raise some.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """Greedy tokens of one host."""
    options = OPTIONS | ENGINE | {"skip_tokenizer_init": False}
    with Engine.from_pretrained(str(model), **options) as engine:
        [output] = engine.generate("abc", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        return list(output.outputs[0].token_ids)


def test_an_engine_on_two_nodes(model: Path, expected: list[int]) -> None:
    options = {"tensor_parallel_size": 2, "num_hosts": 2, "distributed_executor_backend": "ray"}
    asked = ["--json", "--temperature", "0", "--max-tokens", "8", "--ignore-eos"]
    with host_process(["generate", str(model), "abc", *asked, *flags(**ENGINE, **options)], 1) as leader:
        assert leader.wait(120) == 0
        [answer] = [json.loads(line) for line in leader.log if line.startswith("{")]
        assert answer["outputs"][0]["token_ids"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hosts": 3}, "Ray has not 3 nodes"),
        ({"num_hosts": 2, "ray_resources": {"TPU": 4}}, "{'TPU': 4} free"),
    ],
)
def test_what_ray_cannot_place_is_said(
    model: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_hosts, "PLACE_SECONDS", 1)
    config = EngineConfig.create(str(model), distributed_executor_backend="ray", **options)
    with pytest.raises(RuntimeError, match=message):
        ray_hosts.RayHosts(config)


@pytest.fixture(scope="module")
def url(serve_app: Callable[..., str]) -> str:
    """A served application with two replicas."""
    return serve_app(min_replicas="2", max_replicas="3")


def test_the_server_on_ray(url: str, expected: list[int]) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 8}
    answer = client.completions.create(**options, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected)
    stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == answer.choices[0].text
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(**(options | {"max_tokens": -1}))
    assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx2.get(f"{url}/nothing").status_code == 404
    client.close()


def test_prompts_go_where_their_beginning_is(url: str) -> None:
    """Of two replicas one has each prefix: all later requests with it find it in the cache."""
    for letter in "abcd":
        cached = []
        for last in "123456":
            body = {"model": "tiny", "prompt": letter * 80 + last, "max_tokens": 2}
            usage = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0
        assert min(cached[1:]) >= 76


def test_requests_outlive_a_replica(url: str) -> None:
    """Those that are sent to one that is gone are sent to another."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    replica = next(actor for actor in named if "#Replica#" in actor["name"])
    ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]))
    for text in "abcdefgh":
        body = {"model": "tiny", "prompt": text * 70, "max_tokens": 2}
        assert httpx2.post(f"{url}/v1/completions", json=body, timeout=60).is_success


def test_bad_arguments_are_named() -> None:
    from jaxllm.server.ray_serve import build_app

    for arguments, message in (
        ({}, "model: is missing"),
        ({"model": "m", "min_replicas": "3"}, "min_replicas=3"),
        ({"model": "m", "look_back_period_s": "0"}, "look_back_period_s=0"),
        ({"model": "m", "downscale_delay_s": "-1"}, "downscale_delay_s=-1"),
        ({"model": "m", "page_size": "3"}, "page_size=3"),
        ({"model": "m", "num_hosts": "0"}, "num_hosts"),
    ):
        with pytest.raises(ValueError, match=message):
            build_app(arguments)
    for arguments in ({"model": "m", "port": 8000}, {"model": "m", "max_replica": 2}):
        with pytest.raises(TypeError, match="unknown option"):
            build_app(arguments)
