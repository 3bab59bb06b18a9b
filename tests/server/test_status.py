"""Health, models, metrics, tokens, administration: what surrounds the requests for text."""

import asyncio
import dataclasses
import logging
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx2
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from running import Running, running, server_config
from small_text import text_checkpoint

from jaxllm.config import EngineConfig
from jaxllm.server.app import create_app
from jaxllm.server.keys import KeyMiddleware, Keys
from jaxllm.server.metrics import COUNTERS, GAUGES, HISTOGRAMS
from jaxllm.server.run import make_server
from jaxllm.server.service import Service


def not_loaded(keys=(), **options):
    """A client of a server whose model has not been loaded."""
    service = Service(server_config(**options), EngineConfig.create("some-model"))
    transport = httpx2.ASGITransport(create_app(service, Keys(keys)))
    return httpx2.AsyncClient(transport=transport, base_url="http://server"), service


def test_health_and_friends(server: Running) -> None:
    http = server.http
    assert http.get("/health").json() == {"status": "ready"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/ping").is_success
    assert http.post("/ping").is_success
    assert re.fullmatch(r"\d+\.\d+\.\d+", http.get("/version").json()["version"])
    assert http.get("/load").json() == {"server_load": 0}
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 128


def test_before_the_model_is_loaded() -> None:
    async def main() -> None:
        client, service = not_loaded()
        async with client:
            assert (await client.get("/health")).status_code == 200
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "loading")
            asked = await client.post("/v1/completions", json={"prompt": "a"})
            assert asked.status_code == 503
            assert asked.headers["retry-after"] == "5"
            assert (await client.get("/metrics")).status_code == 200
            service.loaded(RuntimeError("no such model"))
            assert (await client.get("/health")).status_code == 503

    asyncio.run(main())


def test_request_ids_go_in_and_out(server: Running) -> None:
    http = server.http
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/health", headers={"x-request-id": "no good"}).headers["x-request-id"] != "no good"
    assert len(http.get("/v1/nothing").headers["x-request-id"]) == 32
    found = server.post("/v1/completions", prompt="a", max_tokens=1, request_id="own").json()
    assert found["id"] == "cmpl-own"


def test_metrics_have_the_names_and_types_of_vllm(server: Running) -> None:
    server.post("/v1/completions", prompt="abc", max_tokens=5, ignore_eos=True)
    text = server.http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for prefix in ("jaxllm", "vllm"):
        for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
            assert {families[f"{prefix}:{name}"].type for name in names} == {kind}
        assert families[f"{prefix}:request_success"].type == "counter"

    def value(name: str, **labels: str) -> float:
        [family] = [f for f in families.values() if name.startswith(f.name)]
        [found] = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
        return found

    assert value("jaxllm:generation_tokens_total", model_name="tiny") >= 5
    assert value("jaxllm:request_success_total", finished_reason="length") >= 1
    assert value("jaxllm:num_requests_running") == 0
    count = value("jaxllm:time_to_first_token_seconds_count")
    assert count >= 1
    assert value("jaxllm:time_to_first_token_seconds_bucket", le="+Inf") == count
    assert value("http_requests_total", handler="/v1/completions", status="2xx") >= 1


def test_metrics_of_programs_and_process(server: Running) -> None:
    def read() -> dict[str, Metric]:
        return {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}

    def total(families: dict[str, Metric], name: str) -> float:
        return sum(s.value for s in families[name].samples if s.name.endswith(("_total", name)))

    server.wait_idle()
    before = read()
    server.post("/v1/completions", prompt="abc", max_tokens=5, ignore_eos=True)
    server.wait_idle()
    families = read()
    steps, of_buckets = (
        total(families, name) - total(before, name) if name in before else total(families, name)
        for name in ("jaxllm:steps", "jaxllm:bucket_steps")
    )
    assert steps == of_buckets >= 5
    assert {int(s.labels["tokens"]) for s in families["jaxllm:bucket_steps"].samples} <= set(range(2, 33))
    backends = {s.labels["backend"]: s.value for s in families["jaxllm:attention_backend_info"].samples}
    assert sum(backends.values()) == 1
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert total(families, "jaxllm:programs_pending") <= total(families, "jaxllm:programs")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_finds_nothing_but_what_vllm_names_so(server: Running) -> None:
    text = server.http.get("/metrics").text
    found = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    lines = (found.stdout + found.stderr).splitlines()
    own = [line for line in lines if not line.endswith("metric names should not contain ':'")]
    assert {line.partition(":")[2] for line in own} == {
        'iteration_tokens_total non-counter metrics should not have "_total" suffix'
    }


def test_metrics_of_replicas(model: Path) -> None:
    """A sample for each replica, and requests that wait for one beside them; names come once."""
    with running(model, engine={"data_parallel_size": 2, "enforce_eager": True}) as server:
        for text in ("abc", "xyz", "123"):
            assert server.post("/v1/completions", prompt=[text] * 4, max_tokens=5, ignore_eos=True).is_success
        text = server.http.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        tokens = {s.labels["engine"]: s.value for s in families["jaxllm:generation_tokens"].samples}
        assert tokens.keys() == {"0", "1"}
        assert sum(tokens.values()) == 3 * 4 * 5
        assert min(tokens.values()) > 0
        waiting = {s.labels["engine"] for s in families["jaxllm:num_requests_waiting"].samples}
        assert waiting == {"0", "1", "front"}
        assert text.count("# TYPE jaxllm:num_requests_running ") == 1
        assert [s.value for s in families["jaxllm:replica_up"].samples] == [1, 1]
        assert [s.value for s in families["jaxllm:replica_given_up"].samples] == [0, 0]
        serving = {"status": "ready", "replicas": 2, "replicas_serving": 2}
        assert server.http.get("/health").json() == server.http.get("/ready").json() == serving
        schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
        assert all(serving.keys() <= schemas[name]["properties"].keys() for name in ("Health", "Readiness"))
        assert server.service.loaded_engine is not None
        failed = server.service.loaded_engine._engine._cores[1]
        failed.failure = RuntimeError("the device is gone")
        assert server.http.get("/health").is_success
        assert server.http.get("/ready").json() == serving | {"replicas_serving": 1}
        # with the next step it starts over
        assert server.post("/v1/completions", prompt="abc", max_tokens=5).is_success
        while server.http.get("/ready").json() != serving:
            time.sleep(0.01)
        again = server.http.get("/metrics").text
        assert 'engine_restarts_total{engine="1",model_name=' in again
        for name in ("bucket_steps", "attention_backend_info", "matmul_backend_info", "engine_restarts"):
            assert {s.labels["engine"] for s in families[f"jaxllm:{name}"].samples} == {"0", "1"}, name
        figures = server.http.get("/ui/state").json()["engine"]
        assert figures["figures"]["num_pages"] == sum(s.value for s in families["jaxllm:pages"].samples)


def test_data_groups_are_no_replicas(tmp_path: Path) -> None:
    groups = {"data_parallel_size": 2, "data_parallel_experts": True, "enforce_eager": True}
    with running(text_checkpoint(tmp_path, model="qwen3-moe"), engine=groups) as server:
        assert server.http.get("/health").json() == server.http.get("/ready").json() == {"status": "ready"}


def test_tokens_there_and_back(server: Running) -> None:
    found = server.post("/tokenize", prompt="a b", return_token_strs=True).json()
    assert found == {
        "count": 3, "max_model_len": 128, "tokens": found["tokens"], "token_strs": ["<s>", "a", "Ġb"],
    }  # fmt: skip
    assert server.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "<s>a b"}
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "hi"}]).json()["tokens"]
    assert server.post("/detokenize", tokens=chat).json() == {"prompt": "<s><|user|>hi>"}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": [{"content": "x"}]}, "messages"),
        ("/tokenize", {"messages": [], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {"tokens": [5000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ):
        response = server.post(path, **body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_administration(server: Running) -> None:
    ask = {"prompt": "what is administered", "max_tokens": 4, "temperature": 0}
    before = server.post("/v1/completions", **ask).json()["choices"][0]["text"]
    server.wait_idle()
    assert server.http.post("/reset_prefix_cache").is_success
    assert server.http.post("/sleep?level=3").status_code == 400
    assert server.http.post("/sleep?level=1").json() == {"status": "sleeping"}
    assert server.http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert server.http.get("/health").is_success
    assert server.post("/v1/completions", **ask).status_code == 503
    assert server.http.post("/wake_up").json() == {"status": "ready"}
    found = server.post("/v1/completions", **ask).json()
    assert found["choices"][0]["text"] == before
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_administration_is_only_there_when_asked_for() -> None:
    async def main() -> None:
        client, _ = not_loaded()
        async with client:
            for path in ("/sleep", "/wake_up", "/reset_prefix_cache"):
                assert (await client.post(path)).status_code == 404

    asyncio.run(main())


def test_keys() -> None:
    async def main() -> None:
        client, _ = not_loaded(keys=["first", "second-ü"])
        async with client:

            async def status(path: str, **headers: str) -> int:
                url = f"http://server{path}"  # whole, or "//health" would be a host
                return (await client.get(url, headers=headers)).status_code

            for path in ("/health", "/ready", "/ping"):
                assert await status(path) in (200, 503)
            for path in (
                "/v1/models",
                "/metrics",
                "/version",
                "/nothing",
                "/%68ealth",
                "//health",
                "/health/",
            ):
                assert await status(path) == 401, path
                assert await status(path, authorization="Bearer wrong") == 401
                assert await status(path, authorization="Bearer first") != 401
            assert await status("/version", authorization="first") == 401
            assert await status("/version", authorization="bearer  first ") == 200
            assert await status("/version", **{"x-api-key": "first"}) == 200
            assert await status("/version", **{"x-api-key": "first", "authorization": "Bearer wrong"}) == 401
            refused = await client.get("/version")
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"

    asyncio.run(main())


def test_under_a_path_that_a_proxy_strips_or_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """Keys are asked for on the same paths in both forms; nothing is served under any other."""
    open_paths = ("/health", "/ready", "/ping", "/metrics", "/")
    closed = ("/version", "/v1/models", "/ui/state")
    odd = (
        "/llm/llm/health", "//llm/health", "/llm//health", "/%6clm/health", "/llm%2fhealth", "/llm/%68ealth",
        "/llmhealth", "/other/health", "/llm",
    )  # fmt: skip

    async def main() -> None:
        client, _ = not_loaded(keys=["k"], metrics_without_key=True, root_path="/llm")
        key = {"authorization": "Bearer k"}
        async with client:

            async def status(path: str, **headers: str) -> int:
                return (await client.get(f"http://server{path}", headers=headers)).status_code

            for root in ("", "/llm"):
                for path in open_paths:
                    assert await status(root + path) in (200, 503), root + path
                for path in closed:
                    assert await status(root + path) == 401, root + path
                    assert await status(root + path, **key) == 200, root + path
            for path in odd:
                assert await status(path) == 401, path
            for path in ("/llm/llm/health", "/llmhealth", "/other/health", "/llm%2fhealth"):
                assert await status(path, **key) == 404, path
            moved = await client.get("/version/", headers=key)
            assert moved.headers["location"] == "http://server/llm/version"

    with caplog.at_level(logging.INFO, "jaxllm.server.requests"):
        asyncio.run(main())
    assert "GET '/llm/v1/models' 200" in caplog.text
    assert "GET '/llm/' 200" in caplog.text


def test_keys_share_no_prefix_cache(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    config = server.service.config
    access = dataclasses.replace(config.access, cache_salt_per_key=True)
    monkeypatch.setattr(server.service, "config", dataclasses.replace(config, access=access))

    async def main() -> None:
        transport = httpx2.ASGITransport(KeyMiddleware(server.app, Keys(["a", "b"])))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:

            async def cached(key: str) -> int:
                body = {"prompt": "a prompt that only one key may know", "max_tokens": 1}
                bearer = {"authorization": f"Bearer {key}"}
                found = (await client.post("/v1/completions", json=body, headers=bearer)).json()
                return found["usage"]["prompt_tokens_details"]["cached_tokens"]

            assert [await cached(key) > 0 for key in ("a", "a", "b", "b", "a")] == [
                False,
                True,
                False,
                True,
                True,
            ]

    asyncio.run(main())
    with pytest.raises(ValueError, match="no keys"):
        make_server(server_config(cache_salt_per_key=True), EngineConfig.create("m"))


def test_the_document_has_all_errors_and_ways_to_give_a_key() -> None:
    async def main() -> None:
        client, _ = not_loaded()
        async with client:
            document = (await client.get("/openapi.json")).json()
        for path, item in document["paths"].items():
            limited = "post" in item and path.startswith(("/v1/", "/tokenize", "/detokenize"))
            assert ("429" in next(iter(item.values()))["responses"]) == limited, path
            for operation in item.values():
                assert all(
                    form.get("schema", form) for form in operation["responses"]["200"]["content"].values()
                ), path
        schemes = document["components"]["securitySchemes"]
        assert {"bearer", "X-Api-Key"} == {s.get("scheme") or s["name"] for s in schemes.values()}
        assert {name for given in document["security"] for name in given} == schemes.keys()

    asyncio.run(main())


def test_web_pages_from_elsewhere() -> None:
    async def main() -> None:
        client, _ = not_loaded(keys=["k"], allowed_origins=("http://page",))
        asked = {"origin": "http://page", "access-control-request-method": "POST"}
        async with client:
            answer = await client.options("/v1/completions", headers=asked)
            assert answer.headers["access-control-allow-origin"] == "http://page"
            other = await client.options("/v1/completions", headers=asked | {"origin": "http://other"})
            assert "access-control-allow-origin" not in other.headers

    asyncio.run(main())
