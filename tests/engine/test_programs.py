"""The closed set of programs, and what the compiler says of them."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from small import golden, greedy, small_engine

from jaxllm import Engine
from jaxllm.config import CacheConfig
from jaxllm.runner.memory import (
    PROCESS_BYTES,
    bytes_per_device,
    count_pages,
    device_memory,
    measure,
    memory_use,
    page_bytes,
)
from jaxllm.runner.programs import Programs


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with small_engine(max_model_len=64) as engine:
        yield engine


def test_cache_is_updated_in_place(engine: Engine) -> None:
    """The compiled forward pass aliases every pool and the page tables, and copies none of them."""
    lowering = engine._core.runner.lowering
    for bucket in (lowering.buckets.sizes[0], lowering.buckets.largest):
        small, large = (lowering.forward(bucket, pages).compile() for pages in (200, 5000))
        cache = bytes_per_device(lowering.cache_shapes(5000))
        analysis, other = large.memory_analysis(), small.memory_analysis()
        assert analysis is not None
        assert other is not None
        assert analysis.alias_size_in_bytes >= cache + bytes_per_device(lowering.rows_shapes.tables)
        assert analysis.temp_size_in_bytes == other.temp_size_in_bytes < cache / 5
        pool = lowering.cache_shapes(5000)[0]
        pool_shape = f"f32[{','.join(map(str, pool.shape))}]"
        text = large.as_text() or ""
        assert pool_shape in text
        assert f"= {pool_shape}{{4,3,2,1,0}} copy(" not in text


def test_sampler_state_is_updated_in_place(engine: Engine) -> None:
    lowering = engine._core.runner.lowering
    rows = lowering.rows_shapes
    compiled = lowering.sample(lowering.buckets.sampled[-1]).compile()
    state = bytes_per_device((rows.tokens, rows.sampler))
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes >= state


def test_nothing_compiles_while_serving(engine: Engine) -> None:
    """Not even in jax itself: after warm-up the programs there are serve every kind of request."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    prompt = golden("llama")["prompt0"].tolist()
    engine.generate([prompt], greedy(2))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3)(np.ones(7)).block_until_ready()
        assert len(compiled) == 1  # the listener hears it
        params = [
            greedy(5),
            greedy(5, logprobs=3),
            greedy(5, prompt_logprobs=2),
            greedy(5, presence_penalty=1.0, logit_bias={3: 1.0}, bad_words=None, min_tokens=2),
        ]
        for count in (1, 2, 4, 6):
            engine.generate([prompt[: 9 * count]] * len(params), params)
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(compiled) == 1
    assert engine.get_metrics()["programs_compiled_late_total"] == 0


def test_the_bar_of_programs_that_are_there_has_no_rate(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = engine._core.runner.programs
    assert programs.wait(progress=True)
    said = capsys.readouterr().err
    assert f"{len(programs)}/{len(programs)} programs [" in said
    assert "/s" not in said


def test_unknown_program() -> None:
    with pytest.raises(KeyError):
        Programs({})["forward", 3]


def test_memory_is_measured(engine: Engine) -> None:
    """With memory_utilization the pages fill what weights, rows, temporaries and the process leave."""
    lowering = engine._core.runner.lowering
    use, page, mesh = measure(lowering), page_bytes(lowering), lowering.mesh
    assert use.weights == bytes_per_device(lowering.params)
    sampler = lowering.sample(lowering.buckets.largest.sampled).compile().memory_analysis()
    assert sampler is not None
    assert use.temporaries > sampler.temp_size_in_bytes > 0
    assert use.process == PROCESS_BYTES
    share = (use.total + 100.5 * page) / device_memory(mesh)
    count = count_pages(CacheConfig(memory_utilization=share), page, mesh, lambda: use)
    assert count == 100
    with pytest.raises(ValueError, match=r"memory_utilization=.*temporaries.*raise memory_utilization"):
        count_pages(CacheConfig(memory_utilization=use.total / device_memory(mesh)), page, mesh, lambda: use)
    with pytest.raises(ValueError, match="kv_cache_memory=1 leaves 1 bytes"):
        count_pages(CacheConfig(kv_cache_memory=1), page, mesh, lambda: use)
    assert count_pages(CacheConfig(kv_cache_memory=10 * page), page, mesh, lambda: use) == 10


def test_what_goes_between_hosts_takes_memory(engine: Engine) -> None:
    lowering = engine._core.runner.lowering
    size = lowering.buckets.largest.tokens * lowering.model.hidden_size * lowering.model.dtype.itemsize
    alone, sender, receiver = (
        memory_use(dataclasses.replace(lowering, comes_from_host=comes, goes_to_host=goes), 0, 0).total
        for comes, goes in ((False, False), (False, True), (True, False))
    )
    assert (sender - alone, receiver - alone) == (2 * size, 4 * size)


def test_longest_request() -> None:
    """What cannot fit is said with the largest that can, and that one does fit."""
    with pytest.raises(
        ValueError, match="max_model_len=64: 10 pages of 4 tokens hold a request of at most 41;"
    ):
        small_engine(max_model_len=64, num_pages=10)
    with small_engine(max_model_len=41, num_pages=10, enforce_eager=True) as engine:
        [output] = engine.generate([list(range(3, 33))], greedy(11))
        assert len(output.outputs[0].token_ids) == 11
    with small_engine(num_pages=10, enforce_eager=True) as engine:
        assert engine._core.runner.lowering.sizes.max_model_len == 41
