"""Which attention kernel an engine runs: by name, one's own, and what is said of those that will not do."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from small import CHECKPOINTS, golden, greedy, small_engine

from jaxllm import LLM, Engine
from jaxllm.engine.metrics import choice_metrics
from pallas_kernels.paged_attention import Backend, Problem, as_backend
from pallas_kernels.registry import Choice

REFERENCE = as_backend("reference").attend
CACHE_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
SMALL: dict[str, Any] = {"max_model_len": 96, "max_num_batched_tokens": 8, "enforce_eager": True}


def mine(*args: Any, **options: Any) -> Any:
    return REFERENCE(*args, **options)


def halved(*args: Any, scale: float, **options: Any) -> Any:
    return REFERENCE(*args, scale=scale / 2, **options)


def no_windows(
    q: Any, k: Any, v: Any, pages: Any, batch: Any, /, *, sliding_window: int | None, **options: Any
) -> Any:
    if sliding_window is not None:
        raise NotImplementedError("windows are not served")
    return REFERENCE(q, k, v, pages, batch, sliding_window=sliding_window, **options)


def old_form(
    q: Any, k: Any, v: Any, pages: Any, batch: Any, /, *, scale: float, sinks: Any = None
) -> Any: ...


def out_only(*args: Any, **options: Any) -> Any:
    return REFERENCE(*args, **options)[0]


def refuse(problem: Problem) -> None:
    raise NotImplementedError(f"head_dim {problem.geometry.head_dim}")


def run(engine: Engine) -> list[int]:
    prompt = golden("llama")["prompt0"].tolist()
    return list(engine.generate([prompt], greedy(16))[0].outputs[0].token_ids)


@pytest.mark.parametrize(
    "kernel", ["reference", "xla", mine, Backend("of mine", mine, as_backend("reference").layout)]
)
def test_a_kernel_of_ones_choice(kernel: Any) -> None:
    with small_engine(attention_backend=kernel, **SMALL) as engine:
        assert run(engine) == golden("llama")["tokens0"].tolist()
        name = kernel if isinstance(kernel, str) else as_backend(kernel).name
        assert engine.attention_backend.backend.name == name
        metrics = engine.get_metrics()
        assert [n for n in metrics if n.startswith("attention_")] == [
            f'attention_backend_info{{backend="{name}"}}'
        ]
        engine.sleep()
        engine.wake_up()
        assert run(engine) == golden("llama")["tokens0"].tolist()


def test_ones_own_kernel_on_two_devices() -> None:
    with small_engine(attention_backend=mine, tensor_parallel_size=2, **SMALL) as engine:
        assert run(engine) == golden("llama")["tokens0"].tolist()


def test_llm_takes_a_kernel() -> None:
    llm = LLM(
        model=str(CHECKPOINTS / "llama"),
        skip_tokenizer_init=True,
        num_gpu_blocks_override=60,
        attention_backend=mine,
        compilation_cache=False,
        **SMALL,
    )
    assert llm.llm_engine.attention_backend.backend.name == "mine"
    llm.llm_engine.close()


BAD = {
    "no such name": ("magic", ValueError, "attention_backend='magic': .*there are auto, .*xla"),
    "for a TPU": (
        "tpu",
        NotImplementedError,
        "'tpu' does not serve this model on cpu: .*serves tpu",
    ),
    "for a GPU": ("gpu", NotImplementedError, "'gpu' does not serve this model on cpu: .*only Hopper GPUs"),
    "a number": (3, ValueError, "attention_backend=3: must be a name, a Backend .*, or a function"),
    "a class": (Backend, TypeError, "attention_backend=.*Backend.*must be one of auto, .*or a function"),
    "other arguments": (old_form, TypeError, r"attention_backend=old_form\(.*cannot be called as \(q, k, v,"),
    "a backend of them": (Backend("b", old_form), TypeError, r"attention_backend=old_form\("),
    "too few results": (out_only, TypeError, "'out_only': returned .* instead of a pair, the output float32"),
    "refused": (
        Backend("b", mine, require=refuse),
        NotImplementedError,
        "attention_backend='b' does not serve this model on cpu: head_dim 8; leave it at 'auto'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_kernel_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, kind, message = BAD[case]
    monkeypatch.setattr("jaxllm.engine.weight_source.load_weights", None)  # nothing is loaded before
    with pytest.raises(kind, match=message):
        small_engine(attention_backend=kernel, **SMALL)


def test_a_kernel_that_does_not_serve_the_model() -> None:
    with pytest.raises(
        NotImplementedError, match=r"'no_windows' does not serve this model .*windows are not"
    ):
        small_engine("gemma3", attention_backend=no_windows, **SMALL)
    with small_engine(attention_backend=no_windows, **SMALL) as engine:
        assert run(engine) == golden("llama")["tokens0"].tolist()


def test_auto_says_what_it_passed_over() -> None:
    choice = Choice(as_backend("xla"), (("cpu", 'no "c++"\nhere'),))
    assert choice_metrics("kernel", choice) == {
        'kernel{backend="xla"}': 1.0,
        'kernel{backend="cpu",reason="no \\"c++\\"\\nhere"}': 0.0,
    }


def test_programs_of_kernels_do_not_mix(tmp_path: Any) -> None:
    """They share a folder of compiled programs, callbacks into Python included."""

    def by_callback(factor: float) -> Any:
        def kernel(q: Any, *args: Any, **options: Any) -> Any:
            q = jax.pure_callback(partial(_scaled, factor), jax.ShapeDtypeStruct(q.shape, q.dtype), q)
            return REFERENCE(q, *args, **options)

        return kernel

    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    options = SMALL | {"compilation_cache": True, "compilation_cache_dir": tmp_path}
    reset_cache()  # jax looks at the setting of the folder once
    try:
        found = []
        for kernel in (by_callback(1.0), by_callback(0.5), halved):
            with small_engine(attention_backend=kernel, **options) as engine:
                found.append(run(engine))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
    assert any(tmp_path.iterdir())
    assert found[0] == golden("llama")["tokens0"].tolist() != found[1] == found[2]


def _scaled(factor: float, q: Any) -> Any:
    return np.asarray(q) * np.asarray(factor, q.dtype)


def test_samples_of_a_request_compute_its_prompt_once() -> None:
    """Pages of 4 tokens: of the 31, 28 are found by each of the others."""
    prompt = golden("llama")["prompt0"].tolist()[:31]
    params = dataclasses.replace(greedy(5), temperature=1.0, seed=7, n=4)
    found, computed = [], []
    for caching in (True, False):
        options = {"max_num_batched_tokens": 128, "enable_prefix_caching": caching, "enforce_eager": True}
        with small_engine(max_model_len=96, **options) as engine:
            [output] = engine.generate([prompt], params)
            found.append([list(sample.token_ids) for sample in output.outputs])
            computed.append(engine.get_metrics()["scheduled_tokens_total"])
    assert found[0] == found[1]
    assert computed == [31 + 3 * 3 + 4 * 4, 4 * 31 + 4 * 4]


def test_one_device_has_no_collectives() -> None:
    with small_engine(**SMALL) as engine:
        lowering = engine._core.runner.lowering
        for program in (lowering.forward(lowering.buckets.largest, 10), lowering.score()):
            assert not re.findall(
                r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)",
                program.compile().as_text() or "",
            )
