"""Prompts that are refused, steps that fail, and what goes on afterwards."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from small import golden, greedy, small_engine

from jaxllm import Engine
from jaxllm.engine.core import EngineFailedError, RequestFailedError

SIZES: dict[str, Any] = {"max_model_len": 96, "num_pages": 60}
"""As in the other tests, so that their compiled programs serve here."""
REFERENCE = golden("llama")
PROMPT: list[int] = REFERENCE["prompt0"].tolist()
EXPECTED: list[int] = REFERENCE["tokens0"].tolist()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with small_engine(**SIZES) as engine:
        yield engine
        assert not engine.has_unfinished_requests()
        assert engine._core.scheduler.cache.stats().num_used == 0


def failing(message: str) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError(message)

    return fail


def tokens(engine: Engine, prompt: list[int], count: int) -> list[int]:
    [output] = engine.generate([prompt], greedy(count))
    return list(output.outputs[0].token_ids)


def test_a_prompt_that_no_step_can_take_is_refused_with_the_numbers() -> None:
    with small_engine(enable_chunked_prefill=False, enforce_eager=True, **SIZES) as engine:
        with pytest.raises(ValueError, match=r"(?s)41.*32"):
            engine.generate([PROMPT[:5], PROMPT], greedy(4))
        assert engine.num_unfinished_requests == 0
        assert len(tokens(engine, PROMPT[:30], 4)) == 4


def test_a_bad_prompt_starts_none_of_a_call(engine: Engine) -> None:
    before = engine.get_metrics()["requests_total"]
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*999"):
        engine.generate([PROMPT, [5, 999]], greedy(12))
    assert engine.get_metrics()["requests_total"] == before


def test_a_failed_step_fails_its_requests_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine._core.runner
    dispatch, calls = runner.dispatch, iter(range(100))

    def fail_once(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("the device is gone")
        return dispatch(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "dispatch", fail_once)
        with pytest.raises(RequestFailedError) as failure:
            engine.generate([PROMPT], greedy(12))
        assert str(failure.value.__cause__) == "the device is gone"
        assert tokens(engine, PROMPT, 12) == EXPECTED[:12]


def test_an_engine_that_always_fails_says_so_and_can_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_engine(enforce_eager=True, **SIZES) as engine:
        monkeypatch.setattr(engine._core.runner, "dispatch", failing("the device is gone"))
        for _ in range(3):
            with pytest.raises((RequestFailedError, EngineFailedError)):
                engine.generate([PROMPT], greedy(4))
        with pytest.raises(EngineFailedError, match=r"call restart\(\)"):
            engine.generate([PROMPT], greedy(4))
        monkeypatch.undo()
        engine.restart()
        assert tokens(engine, PROMPT, 12) == EXPECTED[:12]
        assert engine.get_metrics()["engine_restarts_total"] == 1


def test_an_engine_that_cannot_start_over_ends_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_engine(enforce_eager=True, **(SIZES | {"max_num_seqs": 1})) as engine:
        monkeypatch.setattr(engine._core.runner, "sample", failing("the device is gone"))
        monkeypatch.setattr(engine._core.runner, "reset", failing("the device takes no pages"))
        for request_id in ("runs", "waits"):
            engine.add_request(request_id, PROMPT, greedy(4))
        ends = {output.request_id: output.outputs[0].finish_reason for output in engine.step()}
        assert ends == {"runs": "error", "waits": "error"}
        with pytest.raises(EngineFailedError) as failure:
            engine.step()
        assert str(failure.value.__cause__) == "the device takes no pages"
        monkeypatch.undo()
        engine.restart()
        assert tokens(engine, PROMPT, 12) == EXPECTED[:12]
