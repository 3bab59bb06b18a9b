"""What an engine takes of the device's memory is given back: asleep, closed, deleted, and after an error."""

from typing import Any

import jax
import pytest
from small import golden, greedy, small_engine

from jaxllm.runner import stage
from jaxllm.runner.host_copy import HostCopy

SIZES: dict[str, Any] = {"max_model_len": 96, "num_pages": 60}
"""As in the other tests, so that their compiled programs serve here."""
REFERENCE = golden("llama")
PROMPT: list[int] = REFERENCE["prompt0"].tolist()
EXPECTED: list[int] = REFERENCE["tokens0"].tolist()


def device_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("level", [1, 2])
def test_sleep(level: int) -> None:
    before = device_bytes()
    with small_engine(enforce_eager=True, **SIZES) as engine:
        [first] = engine.generate([PROMPT], greedy(16))
        assert first.outputs[0].token_ids == EXPECTED
        awake = device_bytes()
        assert awake - before > 200_000
        engine.sleep(level)
        assert engine.is_sleeping
        assert device_bytes() == before
        for use in (
            lambda: engine.generate([PROMPT], greedy(12)),
            lambda: engine.stream([5]),
            lambda: engine.add_request("a", PROMPT),
            engine.step,
            engine.sleep,
        ):
            with pytest.raises(RuntimeError, match="wake_up"):
                use()
        engine.wake_up()
        engine.wake_up()
        assert not engine.is_sleeping
        assert device_bytes() == awake
        compiled = engine.get_metrics()["programs_compiled_late_total"]
        [again] = engine.generate([PROMPT], greedy(16))
        assert again.outputs[0].token_ids == EXPECTED
        assert again.num_cached_tokens == 0  # what the pages held is gone
        assert engine.get_metrics()["programs_compiled_late_total"] == compiled


def test_memory_is_back_after_close() -> None:
    before = device_bytes()
    engine = small_engine(enforce_eager=True, **SIZES)
    engine.add_request("a", PROMPT, greedy(30))
    for _ in range(3):
        engine.step()
    assert device_bytes() > before + 200_000
    engine.close()
    assert device_bytes() == before
    engine.close()
    assert not engine.has_unfinished_requests()


def test_memory_is_back_after_del() -> None:
    before = device_bytes()
    engine = small_engine(enforce_eager=True, **SIZES)
    engine.generate([PROMPT], greedy(4, logprobs=1))
    del engine
    assert sum(array.nbytes for array in jax.live_arrays()) == before  # at once, no garbage collection


def test_memory_is_back_after_the_context() -> None:
    before = device_bytes()

    def fail() -> None:
        with small_engine(enforce_eager=True, **SIZES) as engine:
            engine.generate([PROMPT], greedy(4, prompt_logprobs=1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert device_bytes() == before


@pytest.mark.parametrize("asleep", [False, True])
def test_a_closed_engine_is_of_no_use(asleep: bool) -> None:
    before = device_bytes()
    engine = small_engine(enforce_eager=True, **SIZES)
    if asleep:
        engine.sleep()
    engine.close()
    uses: list[Any] = [
        lambda: engine.generate([PROMPT], greedy(4)),
        lambda: engine.generate([]),
        lambda: engine.chat([{"role": "user", "content": "hi"}]),
        lambda: engine.stream(PROMPT),
        lambda: engine.add_request("a", PROMPT, greedy(4)),
        engine.step,
        engine.sleep,
        engine.wake_up,
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="the engine is closed; make another"):
            use()
    assert device_bytes() == before


def test_a_wake_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first try has put on the device goes before the second: there is no room for both."""
    before, found, upload = device_bytes(), list[int](), HostCopy.upload

    def uploading(copy: HostCopy) -> jax.Array:
        found.append(device_bytes())
        return upload(copy)

    def allocate(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with small_engine(enforce_eager=True, **SIZES) as engine:
        engine.sleep(1)
        with monkeypatch.context() as failing:
            failing.setattr(stage, "allocate", allocate)
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.wake_up()
        assert engine.is_sleeping
        monkeypatch.setattr(HostCopy, "upload", uploading)
        engine.wake_up()
        assert found[0] == before
        assert engine.generate([PROMPT], greedy(16))[0].outputs[0].token_ids == EXPECTED


def test_weights_that_are_gone_before_a_sleep_are_loaded_again() -> None:
    """As where experts could not be moved, and then not be loaded."""
    with small_engine(enforce_eager=True, **SIZES) as engine:
        runner = engine._cores[0].runner
        runner._free()
        engine.sleep(1)
        engine.wake_up()
        assert engine.generate([PROMPT], greedy(16))[0].outputs[0].token_ids == EXPECTED


def test_a_replica_that_cannot_sleep_keeps_the_others_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_engine(enforce_eager=True, data_parallel_size=2, **SIZES) as engine:

        def sleep(*, keep_weights: bool) -> None:
            raise MemoryError("no room in the host's memory")

        with monkeypatch.context() as failing:
            failing.setattr(engine._cores[1].runner, "sleep", sleep)
            with pytest.raises(MemoryError):
                engine.sleep(1)
        assert not engine.is_sleeping
        assert all(core.runner.has_weights() for core in engine._cores)
        outputs = engine.generate([PROMPT] * 2, greedy(16))
        assert [output.outputs[0].token_ids for output in outputs] == [EXPECTED] * 2
