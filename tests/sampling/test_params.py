"""SamplingParams has vLLM's names and defaults, and refuses what cannot be."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from jaxllm.sampling import BeamSearchParams, RequestOutputKind, SamplingParams

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "ignore_eos": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "logit_bias": None,
    "allowed_token_ids": None,
    "skip_reading_prefix_cache": False,
}


def test_the_defaults_are_vllms():
    params = SamplingParams()
    assert {name: getattr(params, name) for name in VLLM_DEFAULTS} == VLLM_DEFAULTS
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert [kind.value for kind in RequestOutputKind] == [0, 1, 2]


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "n": [0, -1, 16385, 10**12],
        "presence_penalty": [-2.1, 2.1, math.nan, math.inf],
        "frequency_penalty": [-2.1, 2.1, math.nan, -math.inf],
        "repetition_penalty": [0, -1, math.nan, math.inf],
        "temperature": [-0.1, math.nan, math.inf],
        "top_p": [0, -0.1, 1.1, math.nan],
        "top_k": [-2],
        "min_p": [-0.1, 1.1, math.nan],
        "seed": [2**64, -(2**63) - 1],
        "stop": ["", [""], ["a", ""]],
        "stop_token_ids": [[-1]],
        "max_tokens": [0, -1],
        "min_tokens": [-1, 17],
        "logprobs": [-2],
        "prompt_logprobs": [-2],
        "logit_bias": [{-1: 1.0}, {"a": 1.0}, {"-1": 1.0}, {3: math.nan}, {3: math.inf}, {3: 1.0, "3": 2.0}],
        "allowed_token_ids": [[], [-1]],
        "bad_words": [[""]],
        "extra_args": [{"mine": {}}],
    }.items(),
)
def test_impossible_values_are_refused_by_name(field: str, values: list):
    for value in values:
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "n": [1.5, "1", None, True],
        "temperature": ["0.5", None, True, [1]],
        "top_k": [1.0, math.nan, "3"],
        "top_p": ["0.5", None],
        "seed": [1.5, "1"],
        "stop": [5, [5], [b"a"], {"a": 1}],
        "stop_token_ids": [5, "5", [1.5], ["5"], [True]],
        "max_tokens": [1.5, "8"],
        "logprobs": [1.5],
        "ignore_eos": [1, None],
        "detokenize": ["yes"],
        "output_kind": [0, "DELTA"],
        "logit_bias": [[1], {1.5: 1.0}, {1: "a"}, {1: None}],
        "allowed_token_ids": [5, "5", [1.5]],
        "bad_words": ["word", [5]],
        "logits_processors": ["name", [print]],
        "extra_args": [5],
    }.items(),
)
def test_wrong_types_are_refused_by_name(field: str, values: list):
    for value in values:
        with pytest.raises(TypeError, match=field):
            SamplingParams(**{field: value})


@pytest.mark.parametrize("name", ["guided_json", "best_of", "use_beam_search", "temprature"])
def test_parameters_that_do_not_exist_are_refused(name: str):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: None})  # pyright: ignore[reportArgumentType]


def test_values_together():
    with pytest.raises(ValueError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=50, max_tokens=None).min_tokens == 50
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop="a", detokenize=False)
    with pytest.raises(ValueError, match="n="):
        SamplingParams(n=2, temperature=0)


def test_greedy_turns_the_filters_off():
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.2)
    assert (params.greedy, params.top_p, params.top_k, params.min_p) == (True, 1.0, 0, 0.0)
    assert not SamplingParams(temperature=1e-5).greedy


def test_lists_are_read_once_and_kept():
    words = ["a", "b", "a"]
    params = SamplingParams(stop="end", bad_words=words, stop_token_ids=range(3, 5))
    words.append("c")
    assert (params.stop, params.bad_words, params.stop_token_ids) == (("end",), ("a", "b"), (3, 4))


def test_biases_are_keyed_by_ids_and_clamped():
    assert SamplingParams(logit_bias={"5": 1000, "6": -1000}).logit_bias == {5: 100, 6: -100}
    assert SamplingParams(logit_bias={5: 1.5}).logit_bias == {5: 1.5}


def test_numbers_of_other_libraries_become_pythons():
    numbers: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "seed": np.uint64(2**64 - 1),
    }
    params = SamplingParams(**numbers)
    assert [type(params.temperature), type(params.top_k), params.seed] == [float, int, 2**64 - 1]


def test_vllms_shorthands():
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(logprobs=-1).logprobs == -1
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache is True
    assert (
        SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=False).skip_reading_prefix_cache is False
    )


def test_parameters_do_not_change_but_are_copied():
    params = SamplingParams(temperature=0.5, logit_bias={3: 1.0}, stop=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert dataclasses.replace(params, temperature=0.7).stop == ("a",)
    assert dataclasses.replace(params) == params


def test_beam_search_has_vllms_defaults():
    params = BeamSearchParams(beam_width=4, max_tokens=8)
    assert dataclasses.asdict(params) == {
        "beam_width": 4,
        "max_tokens": 8,
        "ignore_eos": False,
        "temperature": 0.0,
        "length_penalty": 1.0,
        "include_stop_str_in_output": False,
    }


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"beam_width": 0, "max_tokens": 1}, ValueError, "beam_width"),
        ({"beam_width": 1, "max_tokens": 0}, ValueError, "max_tokens"),
        ({"beam_width": 1, "max_tokens": 1, "temperature": math.nan}, ValueError, "temperature"),
        ({"beam_width": 1, "max_tokens": 1, "length_penalty": math.inf}, ValueError, "length_penalty"),
        ({"beam_width": 1.0, "max_tokens": 1}, TypeError, "beam_width"),
        ({"beam_width": 1, "max_tokens": 1, "ignore_eos": 1}, TypeError, "ignore_eos"),
    ],
)
def test_impossible_beam_searches_are_refused(options: dict, error: type, name: str):
    with pytest.raises(error, match=name):
        BeamSearchParams(**options)
