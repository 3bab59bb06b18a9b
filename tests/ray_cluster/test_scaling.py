"""With real Ray: replicas come and go with the load, and keys come from the environment."""

import asyncio
import itertools
import time
from collections.abc import Callable

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("cluster")]

KEY = {"authorization": "Bearer from-environment"}
QUICK = {"look_back_period_s": 4, "metrics_interval_s": 1, "upscale_delay_s": 1, "downscale_delay_s": 2}
PATIENCE = 60.0
"""Seconds for a replica to come, or to go."""


@pytest.fixture(scope="module")
def url(serve_app: Callable[..., str]) -> str:
    """An application with one replica or two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLLM_API_KEY", " from-environment, another")
        return serve_app(min_replicas=1, max_replicas=2, target_ongoing_requests=2, **QUICK)


def num_replicas() -> int:
    """Replicas that there are, in whatever state."""
    from ray import serve

    return sum(serve.status().applications["default"].deployments["Replica"].replica_states.values())


def num_running() -> int:
    from ray import serve

    return serve.status().applications["default"].deployments["Replica"].replica_states.get("RUNNING", 0)


def test_keys_come_from_the_environment(url: str) -> None:
    for headers, status in (({}, 401), ({"authorization": "Bearer x"}, 401), (KEY, 200)):
        assert httpx2.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == status


def test_replicas_come_and_go_with_the_load(url: str) -> None:
    """Nothing fails meanwhile, and both are used while there are two."""

    async def ask(http: httpx2.AsyncClient, prompt: str, max_tokens: int) -> None:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == max_tokens

    async def num_short(http: httpx2.AsyncClient) -> float:
        """Requests for 2 tokens that one of the replicas has had."""
        metrics = (await http.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(metrics)}
        samples = families["jaxllm:request_params_max_tokens"].samples
        return next((sample.value for sample in samples if sample.labels.get("le") == "2.0"), 0)

    async def keep_asking(http: httpx2.AsyncClient, until: asyncio.Event) -> None:
        while not until.is_set():
            await ask(http, "load", 80)

    async def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < end
            await asyncio.sleep(0.2)

    async def main() -> None:
        async with httpx2.AsyncClient(base_url=url, headers=KEY, timeout=60) as http:
            assert num_running() == 1
            end = time.monotonic() + PATIENCE
            enough = asyncio.Event()
            load = [asyncio.create_task(keep_asking(http, enough)) for _ in range(8)]
            await wait_for(lambda: num_running() == 2)
            for num_asked in itertools.count(8, 8):  # until the front has heard of the new one, and used both
                await asyncio.gather(*(ask(http, f"{num_asked}{letter}" * 27, 2) for letter in "abcdefgh"))
                if 0 < await num_short(http) < num_asked:
                    break
                assert time.monotonic() < end
            enough.set()
            await asyncio.gather(*load)
            await wait_for(lambda: num_replicas() == 1)
            await ask(http, "afterwards", 2)

    asyncio.run(main())
