"""How an engine starts: from kept programs, with few programs at first, or with none."""

import logging
import os
import threading
import time
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.stages import Compiled
from small import golden, greedy, small_engine

from jaxllm import Engine, register_logits_processor
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.lowering import Lowering
from jaxllm.runner.programs import Programs
from jaxllm.runner.runner import Runner
from jaxllm.sampling.processors import unregister_logits_processor
from jaxllm.scheduler.plan import StepPlan
from pallas_kernels.paged_attention import as_backend

SHORT = {"max_model_len": 64}
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 8, **SHORT}
BACKGROUND = {"compile_in_background": True, **SHORT}


def answers(engine: Engine) -> list[list[int]]:
    """The tokens of requests of several kinds; steps of 1 to 32 tokens."""
    prompt = golden("llama")["prompt0"].tolist()
    params = [greedy(8), greedy(8, logprobs=2), greedy(8, prompt_logprobs=1), greedy(8, presence_penalty=1.0)]
    outputs = engine.generate([prompt, prompt[:3], prompt[::-1], prompt[:9]], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with small_engine(**SHORT) as engine:
        return answers(engine)


# Kept programs


def caching_engine(folder: Path, **options: Any) -> Engine:
    return small_engine(compilation_cache=True, compilation_cache_dir=folder, **(SMALL | options))


@pytest.fixture(autouse=True)
def jax_cache(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that jax was to keep programs in. It is not told: it would forget the tests' own folder."""
    folders: list[Path] = []
    monkeypatch.setattr("jaxllm.engine.loading.use_compilation_cache", folders.append)
    return folders


def kept_in(folder: Path) -> int:
    return len(list(folder.glob("whole/*.program")))


@pytest.mark.usefixtures("no_jax_cache")
def test_a_second_start_traces_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: list[list[int]],
) -> None:
    with caching_engine(tmp_path) as first:
        count = first.get_metrics()["programs"]
        assert first.get_metrics()["programs_loaded"] == 0
        assert kept_in(tmp_path) == count
        assert answers(first) == expected
    with monkeypatch.context() as patched:
        patched.setattr("jaxllm.runner.lowering.Lowering._lower", None)  # whoever traces fails
        with caching_engine(tmp_path) as second:
            assert second.get_metrics()["programs_loaded"] == count
            pages = second._core.runner.stages[0].arrays[1]
            assert pages is not None
            assert answers(second) == expected
            assert pages[0].is_deleted(), "the cache is not updated in place"
    # a damaged program is compiled anew, and kept again
    file = min(tmp_path.glob("whole/*.program"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    jax.clear_caches()
    with caplog.at_level(logging.WARNING), caching_engine(tmp_path) as third:
        assert third.get_metrics()["programs_loaded"] == count - 1
        assert answers(third) == expected
    assert f"{file} cannot be used" in caplog.text
    assert kept_in(tmp_path) == count
    # what is made for anything else is not found
    with caching_engine(tmp_path, max_model_len=60, enforce_eager=True) as other:
        assert other.get_metrics()["programs_loaded"] == 0
    with caching_engine(tmp_path, num_pages=77, enforce_eager=True) as more:
        assert more.get_metrics()["programs_loaded"] == 0
        assert 78 in more._core.runner.stages[0].arrays[1][0].shape


@pytest.fixture
def processor() -> Iterator[None]:
    register_logits_processor("nothing")(lambda logits, token_counts, params: logits)
    yield
    unregister_logits_processor("nothing")


@pytest.mark.usefixtures("processor")
def test_with_ones_own_processor_nothing_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, jax_cache: list[Path]
) -> None:
    with caplog.at_level(logging.INFO), caching_engine(tmp_path, enforce_eager=True):
        assert kept_in(tmp_path) == 0
    assert "cannot be kept whole" in caplog.text
    assert "is not part of jaxllm" in caplog.text
    assert jax_cache == [tmp_path]


def test_with_ones_own_kernel_nothing_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, jax_cache: list[Path]
) -> None:
    def mine(*args: Any, **options: Any) -> Any:
        return as_backend("reference").attend(*args, **options)

    with caplog.at_level(logging.INFO):
        caching_engine(tmp_path, enforce_eager=True, attention_backend=mine).close()
    assert "mine is not part of jaxllm" in caplog.text
    assert jax_cache == [tmp_path]
    assert kept_in(tmp_path) == 0


@pytest.mark.parametrize("option", ["keep_executables", "compilation_cache"])
def test_keeping_can_be_switched_off(option: str, tmp_path: Path, jax_cache: list[Path]) -> None:
    options = {"compilation_cache": True, "compilation_cache_dir": tmp_path, option: False}
    with small_engine(enforce_eager=True, **SHORT, **options) as engine:
        engine.generate([[5, 6, 7]], greedy(2))
    assert kept_in(tmp_path) == 0
    assert jax_cache == ([tmp_path] if option == "keep_executables" else [])


# Serving while programs are compiled


class Gate:
    """Holds back the programs that are not among the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.made: list[Hashable] = []
        make = Programs._make

        def held(programs: Programs, key: Hashable) -> Compiled:
            if key not in self.first:
                assert self.open.wait(20)
            self.made.append(key)
            return make(programs, key)

        with small_engine(enforce_eager=True, **SHORT) as engine:
            self.first = set(engine._core.runner.lowering.first_programs)
        monkeypatch.setattr(Programs, "_make", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_serves_while_compiling(gate: Gate, expected: list[list[int]]) -> None:
    """Steps run in the larger programs that are there, with the same tokens, and wait for none."""
    with small_engine(**BACKGROUND) as engine:
        before = engine.get_metrics()
        assert 0 < before["programs_pending"] == before["programs"] - len(gate.first)
        assert answers(engine) == expected
        assert set(gate.made) == gate.first
        assert not engine.wait_for_programs(timeout=0.01)
        gate.open.set()
        assert engine.wait_for_programs(timeout=60)
        after = engine.get_metrics()
        assert after["programs_pending"] == after["programs_compiled_late_total"] == 0
        assert len(gate.made) == after["programs"]
        assert answers(engine) == expected


def test_closes_while_compiling(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the program that is being compiled, compiles no other, and leaves no thread behind."""
    gate.first = {"empty"}
    monkeypatch.setattr(Lowering, "first_programs", property(lambda self: ["empty"]))
    engine = small_engine(**BACKGROUND)
    threading.Timer(0.2, gate.open.set).start()
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 30
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compile-")]
    assert len(gate.made) <= 1 + (os.cpu_count() or 1) < engine.get_metrics()["programs"]


def test_a_program_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]) -> None:
    """The others serve; whoever waits for all is told."""
    make = Programs._make

    def fails(programs: Programs, key: Hashable) -> Compiled:
        if isinstance(key, tuple) and key[:2] == ("forward", 8):
            raise RuntimeError("no memory for this one")
        return make(programs, key)

    monkeypatch.setattr(Programs, "_make", fails)
    with small_engine(**BACKGROUND) as engine:
        with pytest.raises(RuntimeError, match="no memory for this one"):
            engine.wait_for_programs()
        assert answers(engine) == expected
        assert engine.get_metrics()["programs_compiled_late_total"] == 0
    with pytest.raises(RuntimeError, match="no memory for this one"):
        small_engine(**SHORT)


def test_any_bucket_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]) -> None:
    sizes = SHORT | {
        "max_num_seqs": 33,
        "max_num_batched_tokens": 64,
    }  # so that there is one of few rows, too
    with small_engine(enable_prefix_caching=False, **sizes) as engine:
        buckets = engine._core.runner.lowering.buckets
        chosen = [buckets.largest]

        def choose(runner: Runner, plan: StepPlan, *, scores: bool) -> Bucket:
            fitting = buckets.holding(plan.num_tokens, len(plan.rows))
            return buckets.largest if scores else chosen[0] if chosen[0] in fitting else fitting[0]

        monkeypatch.setattr(Runner, "_choose_bucket", choose)
        assert [bucket.rows for bucket in buckets.sizes[-2:]] == [8, 33]
        for bucket in buckets.sizes:
            chosen[0] = bucket
            assert answers(engine) == expected


# Without compiling ahead


def test_eager_compiles_what_it_needs_when_it_needs_it(expected: list[list[int]]) -> None:
    with small_engine(enforce_eager=True, **SHORT) as engine:
        begin = engine.get_metrics()
        assert begin["compile_seconds"] == begin["programs_pending"] == 0
        assert begin["programs_compiled_late_total"] == 1  # the one that makes empty pages
        engine.generate([[5, 6, 7]], greedy(3))
        few = engine.get_metrics()["programs_compiled_late_total"]
        # one admission, a prefill and a decode step of two sizes, and their sampler
        assert few == 1 + 1 + 2 + 1
        assert answers(engine) == expected
        assert few < engine.get_metrics()["programs_compiled_late_total"] <= begin["programs"]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("compile-")]


def test_options_of_one_thread_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), jax.default_matmul_precision("highest"):
        small_engine(enforce_eager=True, **SHORT).close()
    assert "jax_default_matmul_precision: set for this thread alone" in caplog.text
