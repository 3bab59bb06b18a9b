"""Every sampling parameter has its effect through the engine, and a test that fails if it is ignored."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from small import golden, small_engine
from small_text import BOS, EOS, USER, make_tokenizer, text_checkpoint
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxllm import Engine, RequestOutputKind, SamplingParams
from jaxllm.engine.outputs import CompletionOutput
from jaxllm.sampling import register_logits_processor
from jaxllm.sampling.processors import unregister_logits_processor

SIZES: dict[str, Any] = {
    "max_model_len": 96,
    "num_pages": 60,
    "max_logprobs": -1,
    "enforce_eager": True,
    "skip_tokenizer_init": False,
}
REFERENCE = golden("llama")
PROMPT: list[int] = REFERENCE["prompt0"].tolist()
EXPECTED: list[int] = REFERENCE["tokens0"].tolist()
LOGITS: np.ndarray = REFERENCE["logits0"][len(PROMPT) - 1]
"""After the prompt."""
LIKELIEST: list[int] = np.argsort(-LOGITS).tolist()
DEFAULTS = {"temperature": 0.5, "top_k": 2, "max_new_tokens": 7, "eos_token_id": [EOS, 50]}
SAMPLES = 60


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = text_checkpoint(tmp_path_factory.mktemp("model"), generation=DEFAULTS)

    @register_logits_processor("forbid_after", parameters={"token": None, "count": 1.0})
    def forbid_after(logits, token_counts, params):
        token = jnp.arange(logits.shape[1]) == params["token"][:, None]
        return jnp.where(token & (token_counts >= params["count"][:, None]), -jnp.inf, logits)

    try:
        made = small_engine(str(folder), **SIZES)
    finally:
        unregister_logits_processor("forbid_after")
    with made:
        yield made


def complete(engine: Engine, **params: Any) -> CompletionOutput:
    """The golden prompt's completion; greedy and without an end unless told otherwise."""
    given = {"temperature": 0, "max_tokens": len(EXPECTED), "ignore_eos": True} | params
    [output] = engine.generate([PROMPT], SamplingParams(**given))
    return output.outputs[0]


def first_tokens(engine: Engine, **params: Any) -> list[int]:
    """Many samples of the token after the prompt, the same ones each time."""
    params = {"temperature": 4.0, "seed": 0, "n": SAMPLES, "max_tokens": 1, "ignore_eos": True} | params
    [output] = engine.generate([PROMPT], SamplingParams(**params))
    return [sample.token_ids[0] for sample in output.outputs]


def probabilities(temperature: float) -> np.ndarray:
    scaled = np.exp((LOGITS - LOGITS.max()).astype(np.float64) / temperature)
    return scaled / scaled.sum()


def test_every_parameter_is_tested() -> None:
    """By a test of its name in this file; grammars have `test_structured_outputs.py`."""
    names = {field.name for field in dataclasses.fields(SamplingParams)} - {"structured_outputs"}
    assert {f"test_{name}" for name in names} <= set(globals())


# Which token


def test_temperature(engine: Engine) -> None:
    assert complete(engine).token_ids == EXPECTED
    for temperature in (0.5, 1.0, 4.0):
        [sure, *_] = sorted(probabilities(temperature), reverse=True)
        found = first_tokens(engine, temperature=temperature, n=120)
        share = np.mean([token == EXPECTED[0] for token in found])
        assert abs(share - sure) < 4 * np.sqrt(sure * (1 - sure) / 120) + 1e-9
    assert set(first_tokens(engine, temperature=1e-6, n=1)) == {EXPECTED[0]}


def test_top_k(engine: Engine) -> None:
    assert len(set(first_tokens(engine))) > 10
    assert set(first_tokens(engine, top_k=3)) == set(LIKELIEST[:3])


def test_top_p(engine: Engine) -> None:
    shares = probabilities(4.0)[LIKELIEST]
    size = int(np.searchsorted(np.cumsum(shares), 0.3)) + 1
    assert 1 < size < 30
    found = set(first_tokens(engine, top_p=0.3))
    assert len(found) > 1
    assert found <= set(LIKELIEST[:size])


def test_min_p(engine: Engine) -> None:
    shares = probabilities(4.0)
    allowed = set(np.flatnonzero(shares >= 0.5 * shares.max()).tolist())
    assert 1 < len(allowed) < 30
    found = set(first_tokens(engine, min_p=0.5))
    assert len(found) > 1
    assert found <= allowed
    assert not set(first_tokens(engine)) <= allowed


def test_seed(engine: Engine) -> None:
    one, same, other = (complete(engine, temperature=1.0, seed=seed).token_ids for seed in (1, 1, 2))
    assert one == same != other
    without = [tuple(complete(engine, temperature=1.0).token_ids) for _ in range(3)]
    assert len(set(without)) == 3


def expected_with_penalties(output: CompletionOutput, presence: float, frequency: float) -> list[int]:
    """What the raw logprobs along the output's own path say that it should have chosen."""
    assert output.logprobs is not None
    counts = np.zeros(len(LOGITS))
    expected = []
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        logprobs = np.array([entry[i].logprob for i in range(len(LOGITS))])
        expected.append(int(np.argmax(logprobs - presence * (counts > 0) - frequency * counts)))
        counts[token] += 1
    return expected


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (-2.0, 0.0), (0.0, -1.0)])
def test_penalties(engine: Engine, presence: float, frequency: float) -> None:
    output = complete(
        engine, presence_penalty=presence, frequency_penalty=frequency, logprobs=-1, max_tokens=40
    )
    assert output.token_ids == expected_with_penalties(output, presence, frequency)
    assert output.token_ids != expected_with_penalties(output, 0, 0)


def test_presence_penalty(engine: Engine) -> None:
    test_penalties(engine, 1.0, 0.0)


def test_frequency_penalty(engine: Engine) -> None:
    test_penalties(engine, 0.0, 1.0)


def test_repetition_penalty(engine: Engine) -> None:
    """A huge one leaves no token that has been seen, in the prompt or in the output."""
    assert len({*PROMPT, *EXPECTED}) < len({*PROMPT}) + len(EXPECTED)
    found = complete(engine, repetition_penalty=1e6, max_tokens=30).token_ids
    assert len({*PROMPT, *found}) == len({*PROMPT}) + 30
    seen = np.isin(np.arange(len(LOGITS)), PROMPT)
    penalized = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.3, LOGITS * 1.3), LOGITS)
    assert complete(engine, repetition_penalty=1.3).token_ids[0] == int(np.argmax(penalized))


def test_logit_bias(engine: Engine) -> None:
    assert complete(engine, logit_bias={9: 100}).token_ids == [9] * len(EXPECTED)
    assert complete(engine, logit_bias={EXPECTED[0]: -100}).token_ids[0] == LIKELIEST[1]
    gap = float(LOGITS[LIKELIEST[0]] - LOGITS[LIKELIEST[5]])
    assert complete(engine, logit_bias={LIKELIEST[5]: gap - 0.01}).token_ids[0] == LIKELIEST[0]
    assert complete(engine, logit_bias={LIKELIEST[5]: gap + 0.01}).token_ids[0] == LIKELIEST[5]


def test_allowed_token_ids(engine: Engine) -> None:
    allowed = sorted(set(range(10, 60)) - {LIKELIEST[0]})
    found = complete(engine, allowed_token_ids=allowed).token_ids
    assert found[0] == next(token for token in LIKELIEST if token in allowed)
    assert set(found) <= set(allowed)
    assert len(set(found)) > 1


def test_bad_words(engine: Engine) -> None:
    tokenizer = make_tokenizer()
    texts = [str(tokenizer.decode([token])) for token in EXPECTED]
    at = next(i for i in range(1, len(texts) - 1) if (texts[i] + texts[i + 1]).isalnum())
    word, pair = texts[at] + texts[at + 1], EXPECTED[at : at + 2]
    assert tokenizer.encode(word, add_special_tokens=False) == pair
    found = complete(engine, bad_words=[word]).token_ids
    assert found[: at + 1] == EXPECTED[: at + 1]  # its first token alone may stand
    assert found[at + 1] != EXPECTED[at + 1]
    assert pair not in [list(found[i : i + 2]) for i in range(len(found))]
    assert EXPECTED[0] not in complete(engine, bad_words=[texts[0]]).token_ids


def test_logits_processors(engine: Engine) -> None:
    chosen = {"logits_processors": ["forbid_after"], "extra_args": {"forbid_after": {"token": EXPECTED[1]}}}
    assert EXPECTED.count(EXPECTED[1]) > 1
    found = complete(engine, **chosen).token_ids
    assert found[:2] == EXPECTED[:2]
    assert found.count(EXPECTED[1]) == 1
    assert complete(engine).token_ids == EXPECTED
    with pytest.raises(ValueError, match=r"logits_processors='unknown': .*\['forbid_after'\]"):
        complete(engine, logits_processors=["unknown"])


def test_extra_args(engine: Engine) -> None:
    values = {"token": EXPECTED[0], "count": 0}
    found = complete(engine, logits_processors=["forbid_after"], extra_args={"forbid_after": values})
    assert found.token_ids[0] == LIKELIEST[1]
    with pytest.raises(ValueError, match="lacks 'token'"):
        complete(engine, logits_processors=["forbid_after"])


# How many, and when to stop


def test_n(engine: Engine) -> None:
    [output] = engine.generate(
        [PROMPT], SamplingParams(n=9, seed=0, max_tokens=3)
    )  # more than there are rows
    assert [sample.index for sample in output.outputs] == list(range(9))
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 5


def test_max_tokens(engine: Engine) -> None:
    for count in (1, 7):
        output = complete(engine, max_tokens=count)
        assert output.token_ids == EXPECTED[:count]
        assert (output.finish_reason, output.stop_reason) == ("length", None)
    everything = complete(engine, max_tokens=None)
    assert len(everything.token_ids) == 96 - len(PROMPT)
    assert everything.finish_reason == "length"


def test_ignore_eos(engine: Engine) -> None:
    bias = {EOS: 100.0}
    stopped = complete(engine, logit_bias=bias, ignore_eos=False)
    assert (stopped.token_ids, stopped.text) == ([EOS], "")
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    going = complete(engine, logit_bias=bias, ignore_eos=True)
    assert (going.token_ids, going.finish_reason) == ([EOS] * len(EXPECTED), "length")
    also = complete(engine, logit_bias={50: 100.0}, ignore_eos=False)  # as generation_config.json says
    assert (also.token_ids, also.finish_reason) == ([50], "stop")


def test_stop_token_ids(engine: Engine) -> None:
    at = next(i for i in range(1, len(EXPECTED)) if EXPECTED[i] not in EXPECTED[:i])
    output = complete(engine, stop_token_ids=[EXPECTED[at]])
    assert output.token_ids == EXPECTED[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", EXPECTED[at])
    assert output.text == make_tokenizer().decode(EXPECTED[:at])


def test_min_tokens(engine: Engine) -> None:
    bias = {EOS: 100.0, 9: 50.0}
    output = complete(engine, logit_bias=bias, ignore_eos=False, min_tokens=4)
    assert output.token_ids == [9, 9, 9, 9, EOS]
    stop = complete(engine, stop_token_ids=[EXPECTED[0]], min_tokens=3)
    assert EXPECTED[0] not in stop.token_ids[:3]
    assert stop.token_ids[0] == LIKELIEST[1]
    text = make_tokenizer().decode(EXPECTED)
    assert complete(engine, stop=[text[0]]).text == ""
    assert len(complete(engine, stop=[text[0]], min_tokens=5).token_ids) >= 5


def test_stop(engine: Engine) -> None:
    text = make_tokenizer().decode(EXPECTED)
    word = text[3:6]  # of several tokens
    assert text.index(word) == 3
    for stop in (word, ["nowhere", word]):
        output = complete(engine, stop=stop)
        assert output.text == text[:3]
        assert (output.finish_reason, output.stop_reason) == ("stop", word)
        assert output.token_ids == EXPECTED[: len(output.token_ids)] != EXPECTED
    assert complete(engine, stop=["nowhere"]).text == text
    streamed = engine.stream(PROMPT, SamplingParams(temperature=0, max_tokens=16, stop=word, ignore_eos=True))
    assert "".join(output.outputs[0].text for output in streamed) == text[:3]


def test_include_stop_str_in_output(engine: Engine) -> None:
    text = make_tokenizer().decode(EXPECTED)
    output = complete(engine, stop=text[3:6], include_stop_str_in_output=True)
    assert output.text == text[:6]


# What comes back


def test_detokenize(engine: Engine) -> None:
    output = complete(engine, detokenize=False)
    assert (output.token_ids, output.text) == (EXPECTED, "")
    assert complete(engine).text == make_tokenizer().decode(EXPECTED)


def test_skip_special_tokens(engine: Engine) -> None:
    forced: dict[str, Any] = {"logit_bias": {USER: 100}, "max_tokens": 3}
    assert complete(engine, **forced).text == ""
    assert complete(engine, **forced, skip_special_tokens=False).text == "<|user|>" * 3


def test_spaces_between_special_tokens(engine: Engine, tmp_path: Path) -> None:
    """It matters to tokenizers that join tokens with spaces."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(123)}, unk_token="w0"))
    words.add_special_tokens(["<a>", "<b>"])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    options = SIZES | {"tokenizer": str(tmp_path)}
    forced = SamplingParams(
        temperature=0, max_tokens=2, allowed_token_ids=[123], skip_special_tokens=False, ignore_eos=True
    )
    with small_engine(**options) as with_words:
        for spaces, expected in ((True, " <a> <a>"), (False, " <a><a>")):
            params = dataclasses.replace(forced, spaces_between_special_tokens=spaces)
            assert with_words.generate([PROMPT], params)[0].outputs[0].text == expected


def test_logprobs(engine: Engine) -> None:
    for count in (0, 3, -1):
        entries = complete(engine, logprobs=count, max_tokens=2).logprobs
        assert entries is not None
        assert [len(entry) for entry in entries] == [{0: 1, 3: 3, -1: 125}[count]] * 2
    assert complete(engine).logprobs is None


def test_prompt_logprobs(engine: Engine) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    [output] = engine.generate([PROMPT], params)
    assert output.prompt_logprobs is not None
    assert [list(entry or ()) for entry in output.prompt_logprobs] == [[], *([token] for token in PROMPT[1:])]
    [output] = engine.generate([PROMPT], dataclasses.replace(params, prompt_logprobs=None))
    assert output.prompt_logprobs is None


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_output_kind(engine: Engine, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, output_kind=kind)
    engine.add_request("a", PROMPT, params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    found = [(list(output.outputs[0].token_ids), output.outputs[0].text) for output in outputs]
    text = make_tokenizer().decode
    parts = {
        RequestOutputKind.CUMULATIVE: [EXPECTED[:i] for i in range(1, 6)],
        RequestOutputKind.DELTA: [[token] for token in EXPECTED[:5]],
        RequestOutputKind.FINAL_ONLY: [EXPECTED[:5]],
    }[kind]
    assert found == [(tokens, text(tokens)) for tokens in parts]
    [generated] = engine.generate([PROMPT], params)  # always whole
    assert generated.outputs[0].token_ids == EXPECTED[:5]


def test_skip_reading_prefix_cache(engine: Engine) -> None:
    engine.reset_prefix_cache()
    cached = {}
    for skip in (None, False, True):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, skip_reading_prefix_cache=skip)
        engine.generate([PROMPT], params)
        [output] = engine.generate([PROMPT], params)
        cached[skip] = output.num_cached_tokens
        assert output.outputs[0].token_ids == EXPECTED[:4]
    assert cached == {None: 40, False: 40, True: 0}


# What stands beside the parameters


def test_truncate_prompt_tokens(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    [kept] = engine.generate([PROMPT], params, truncate_prompt_tokens=9)
    [short] = engine.generate([PROMPT[-9:]], params)
    assert kept.prompt_token_ids == PROMPT[-9:]
    assert kept.outputs[0].token_ids == short.outputs[0].token_ids
    [fits] = engine.generate([PROMPT * 5], params, truncate_prompt_tokens=-1)
    assert fits.prompt_token_ids == (PROMPT * 5)[-90:]
    assert len(fits.outputs[0].token_ids) == 6


def test_add_special_tokens(engine: Engine) -> None:
    params = SamplingParams(max_tokens=1)
    for add in (True, False):
        [output] = engine.generate("hello", params, add_special_tokens=add)
        assert (output.prompt_token_ids[0] == BOS) == add


def test_cache_salt(engine: Engine) -> None:
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    cached = []
    for salt in ("a", "b", "a", None):
        prompt: Any = {"prompt_token_ids": PROMPT} | ({"cache_salt": salt} if salt else {})
        [output] = engine.generate(prompt, params)
        cached.append(output.num_cached_tokens)
        assert output.outputs[0].token_ids == EXPECTED[:4]
    assert cached == [0, 0, 40, 0]


def test_without_parameters_the_models_own(engine: Engine) -> None:
    outputs = engine.generate([PROMPT] * 30)
    assert max(len(output.outputs[0].token_ids) for output in outputs) == 7
    assert {output.outputs[0].token_ids[0] for output in outputs} <= set(LIKELIEST[:2])
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 1
    [given] = engine.generate([PROMPT], SamplingParams(temperature=0, ignore_eos=True))
    assert given.outputs[0].token_ids == EXPECTED
