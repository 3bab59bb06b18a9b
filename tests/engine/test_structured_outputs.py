"""Outputs under a grammar: the same tokens whatever else runs, drawn as the model would draw among them."""

import functools
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from small import OPTIONS
from small_text import EOS, text_checkpoint

from jaxllm import BeamSearchParams, Engine, SamplingParams, StructuredOutputsParams
from jaxllm.structured import grammar

CALM: dict[str, Any] = {"async_scheduling": False, "enable_prefix_caching": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "calm": CALM,
    "asynchronous": CALM | {"async_scheduling": True},
    "asynchronous and cached": {},
    "asynchronous chunks of 2, cached": {"max_num_batched_tokens": 2},
    "by priority": {"policy": "priority"},
}
"""All on so few pages that requests preempt each other."""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 500}, "b": {"enum": ["x", "yz"]}},
    "required": ["b"],
    "additionalProperties": False,
}
CONSTRAINTS: list[dict[str, Any] | None] = [
    {"json": SCHEMA},
    {"regex": "[a-f]{3,9}(-[0-9]{2}){1,3}"},
    None,
    {"choice": ["yes", "no", "maybe not"]},
    {"grammar": 'root ::= "(" root ")" root | ""'},
    {"json_object": True, "disable_any_whitespace": True},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text_checkpoint(tmp_path_factory.mktemp("structured") / "model")


@pytest.fixture(scope="module")
def engines(folder: Any) -> Any:
    """Engines by their variants."""

    @functools.cache
    def engine(variant: str) -> Engine:
        options = OPTIONS | {
            "skip_tokenizer_init": False,
            "max_model_len": 96,
            "num_pages": 32,
            "max_logprobs": -1,
        }
        return Engine.from_pretrained(str(folder), **(options | VARIANTS[variant]))

    return engine


def held(**constraint: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**constraint)


def case(seed: int) -> tuple[list[int], SamplingParams]:
    """One of a hundred different requests; half of them begin with the same tokens."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(0).integers(4, 125, 24).tolist()
    prompt = (shared if seed % 2 else []) + rng.integers(4, 125, rng.integers(1, 30)).tolist()
    constraint = CONSTRAINTS[seed % len(CONSTRAINTS)]
    kind = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 1.2, "repetition_penalty": 1.2},
        {"min_tokens": 5},
        {"stop": ["2", "c-"]},
    ][seed % 5]
    params = SamplingParams(
        seed=seed, max_tokens=30, structured_outputs=constraint and held(**constraint), **kind
    )
    return prompt, params


def run(engine: Engine, arrivals: list[tuple[int, int]]) -> dict[str, tuple[list[int], str, str | None]]:
    """Adds each (step, seed) at its step, runs until all have finished, and returns what they said."""
    waiting = sorted(arrivals)
    found = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][0] <= step:
            _, seed = waiting.pop(0)
            engine.add_request(f"{seed}", *case(seed), priority=seed % 3)
        for output in engine.step():
            [completion] = output.outputs
            found[output.request_id] = (
                list(completion.token_ids),
                completion.text,
                completion.finish_reason,
            )
        step += 1
    return found


@functools.cache
def alone(calm: Engine, seed: int) -> tuple[list[int], str, str | None]:
    return run(calm, [(0, seed)])[f"{seed}"]


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=4)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 99)), min_size=4, max_size=9, unique_by=lambda a: a[1]
    )
)
def test_same_tokens(engines: Any, variant: str, arrivals: list[tuple[int, int]]) -> None:
    found = run(engines(variant), arrivals)
    assert found == {f"{seed}": alone(engines("calm"), seed) for _, seed in arrivals}
    assert engines(variant)._core.scheduler.cache.stats().num_used == 0


def test_everything_really_happens(engines: Any) -> None:
    """Thirty requests at once, of which some are preempted, and all that end by themselves fit."""
    crowd = [(0, seed) for seed in range(30)]
    crowded = engines("asynchronous and cached")
    before = crowded.get_metrics()
    found = run(crowded, crowd)
    after = crowded.get_metrics()
    assert found == {f"{seed}": alone(engines("calm"), seed) for _, seed in crowd}
    assert after["preemptions_total"] > before["preemptions_total"]
    assert after["programs_compiled_late_total"] == 0
    ends = [(found[f"{seed}"], case(seed)[1]) for seed in range(30)]
    done = [(text, params) for (_, text, reason), params in ends if reason == "stop" and not params.stop]
    assert len(done) >= 8
    for text, params in done:
        structured = params.structured_outputs
        if structured is not None and structured.regex is not None:
            assert re.fullmatch(structured.regex, text)
        elif structured is not None and structured.constraint in ("json", "json_object"):
            assert isinstance(json.loads(text), dict)
        elif structured is not None and structured.choice is not None:
            assert text in structured.choice


def test_rows_without_a_grammar_run_ahead(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a grammar begins before the one before it has been read, too."""
    engine = engines("asynchronous")
    in_flight: list[int] = []
    runner = engine._core.runner
    dispatch = runner.dispatch

    def spy(*arguments: Any, **options: Any) -> Any:
        in_flight.append(len(engine._core._in_flight))
        return dispatch(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "dispatch", spy)
        engine.generate([[5, 6]] * 2, [case(2)[1], replace(case(1)[1], ignore_eos=True)])
    assert in_flight[0] == 0
    assert set(in_flight[1:]) == {1}


def test_a_step_that_fails_between_forward_pass_and_sampler(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the step before it brought has been read by then, and is given out all the same."""
    engine = engines("asynchronous")
    runner, sample, calls = engine._core.runner, engine._core.runner.sample, iter(range(100))

    def fail_once(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("the device is gone")
        return sample(*arguments, **options)

    structured = held(regex="[a-z]{30}")
    engine.add_request("short", [5], SamplingParams(max_tokens=3, structured_outputs=structured))
    engine.add_request("long", [6], SamplingParams(max_tokens=9, structured_outputs=structured))
    found = {}
    with monkeypatch.context() as patch:
        patch.setattr(runner, "sample", fail_once)
        while engine.has_unfinished_requests():
            found |= {output.request_id: output.outputs[0] for output in engine.step()}
    assert (found["short"].finish_reason, len(found["short"].text)) == ("length", 3)
    assert found["long"].finish_reason == "error"


def test_samples_of_one_request(engines: Any) -> None:
    """n samples follow the grammar apart, as n requests with seeds that count up."""
    params = SamplingParams(seed=5, n=4, max_tokens=30, structured_outputs=held(json=SCHEMA))
    [together] = engines("asynchronous and cached").generate([[7, 8, 9]], params)
    singles = [replace(params, n=1, seed=5 + i) for i in range(4)]
    apart = engines("calm").generate([[7, 8, 9]] * 4, singles)
    assert [o.token_ids for o in together.outputs] == [o.outputs[0].token_ids for o in apart]
    assert len({o.text for o in together.outputs}) > 1


def test_the_distribution_is_the_models_own_among_what_is_allowed(engines: Any) -> None:
    """3,000 first tokens under a grammar, against the model's probabilities of them, made to sum to 1."""
    engine, prompt = engines("asynchronous and cached"), [10, 20, 30]
    structured = held(regex="[a-j ]")
    params = SamplingParams(n=3000, seed=1, max_tokens=4, temperature=1.5, structured_outputs=structured)
    [output] = engine.generate([prompt], params)
    drawn = [o.token_ids[0] for o in output.outputs]
    assert {o.finish_reason for o in output.outputs} == {"stop"}
    assert {len(o.token_ids) for o in output.outputs} == {1}

    wanted = SamplingParams(max_tokens=1, logprobs=-1, temperature=0)
    [position] = engine.generate([prompt], wanted)[0].outputs[0].logprobs
    allowed = sorted(set(drawn))
    logprobs = np.array([position[token].logprob for token in allowed])
    weights = np.exp(logprobs / 1.5)
    expected = weights / weights.sum() * len(drawn)
    counts = np.array([drawn.count(token) for token in allowed])
    assert len(allowed) == 11
    assert chisquare(counts, expected).pvalue > 0.001


def test_logprobs_are_the_models_own(engines: Any) -> None:
    """Of all tokens, not only of those that the grammar allows."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=3, structured_outputs=held(choice=["q"]))
    [output] = engines("calm").generate([[10, 20, 30]], params)
    [position] = output.outputs[0].logprobs
    [token] = output.outputs[0].token_ids
    assert position[token].rank > 1
    assert position[token].logprob < max(entry.logprob for entry in position.values())


def test_the_end_comes_where_the_grammar_accepts(engines: Any) -> None:
    """However likely the end-of-sequence token is made, it waits; and the other way round."""
    calm = engines("calm")
    eager = SamplingParams(max_tokens=20, logit_bias={EOS: 100.0}, structured_outputs=held(regex="(ab){2,9}"))
    assert calm.generate([[5]], eager)[0].outputs[0].text == "abab"
    least = calm.generate([[5]], replace(eager, min_tokens=9))[0].outputs[0]
    assert (least.text, least.finish_reason) == ("ababababab", "stop")
    on = calm.generate([[5]], replace(eager, ignore_eos=True))[0].outputs[0]
    assert (on.text, on.finish_reason) == ("ab" * 9, "stop")
    capped = calm.generate([[5]], replace(eager, ignore_eos=True, max_tokens=7))[0].outputs[0]
    assert (capped.text, capped.finish_reason) == ("abababa", "length")
    past = calm.generate([[5]], replace(eager, min_tokens=20))[0].outputs[0]
    assert (past.text, past.finish_reason) == ("ab" * 9, "stop")


def test_stop_strings_and_stop_tokens(engines: Any) -> None:
    calm = engines("calm")
    params = SamplingParams(max_tokens=20, structured_outputs=held(choice=["abcdef"]))
    cut = calm.generate([[5]], replace(params, stop=["cd"]))[0].outputs[0]
    assert (cut.text, cut.stop_reason) == ("ab", "cd")
    token = calm.get_tokenizer().encode("c", add_special_tokens=False)[0]
    cut = calm.generate([[5]], replace(params, stop_token_ids=[token]))[0].outputs[0]
    assert (cut.text, cut.stop_reason) == ("ab", token)


def test_allowed_token_ids_narrow_the_grammar(engines: Any) -> None:
    calm = engines("calm")
    ids = calm.get_tokenizer().encode("acd", add_special_tokens=False)
    params = SamplingParams(max_tokens=9, allowed_token_ids=ids, structured_outputs=held(regex="[a-c]{5}"))
    assert set(calm.generate([[5]], params)[0].outputs[0].text) <= set("ac")
    with pytest.raises(ValueError, match="allowed_token_ids: has none of the tokens"):
        calm.generate([[5]], replace(params, structured_outputs=held(regex="a?b")))


def test_outputs_without_text(engines: Any) -> None:
    params = SamplingParams(max_tokens=9, detokenize=False, structured_outputs=held(choice=["abc"]))
    calm = engines("calm")
    [output] = calm.generate([[5]], params)
    assert output.outputs[0].token_ids == calm.get_tokenizer().encode("abc", add_special_tokens=False)


@pytest.mark.parametrize("variant", ["calm", "asynchronous"])
def test_a_grammar_that_fails_ends_its_own_request(
    engines: Any, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(variant)
    limits = grammar.LLParserLimits(max_lexer_states=40, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    bad = SamplingParams(
        max_tokens=40, seed=0, structured_outputs=held(regex="([a-z]*q[a-z]{7}|[a-z ]{39})x")
    )
    engine.add_request("bad", [5, 6], bad)
    for seed in range(4):
        engine.add_request(f"{seed}", *case(seed))
    found = {}
    while engine.has_unfinished_requests():
        found |= {output.request_id: output for output in engine.step()}
    failed = found.pop("bad")
    assert failed.outputs[0].finish_reason == "error"
    assert isinstance(failed.error, ValueError)
    assert str(failed.error).startswith("structured_outputs.regex: ")
    tokens = {name: list(output.outputs[0].token_ids) for name, output in found.items()}
    assert tokens == {f"{seed}": alone(engines("calm"), seed)[0] for seed in range(4)}
    with pytest.raises(ValueError, match=r"structured_outputs\.regex"):
        engine.generate([[5, 6]], bad)


def test_what_cannot_be_served_is_refused(engines: Any) -> None:
    calm = engines("calm")
    params = [SamplingParams(), SamplingParams(structured_outputs=held(regex="(?=a)"))]
    with pytest.raises(ValueError, match=r"prompts\[1\]: structured_outputs.regex: .*look-around"):
        calm.generate([[5], [6]], params)
    assert calm.num_unfinished_requests == 0
    with pytest.raises(TypeError, match="structured_outputs"):
        BeamSearchParams(beam_width=2, max_tokens=3, structured_outputs=held(regex="a"))


def test_without_a_tokenizer(folder: Any) -> None:
    with Engine.from_pretrained(str(folder), **OPTIONS, enforce_eager=True) as engine:
        params = SamplingParams(detokenize=False, structured_outputs=held(regex="a"))
        with pytest.raises(ValueError, match="structured_outputs: needs a tokenizer"):
            engine.generate([[5]], params)
