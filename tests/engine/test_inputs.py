"""Prompts and parameters: what becomes of good ones, and how bad ones are refused."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers_made
from transformers import PreTrainedTokenizerFast

from jaxllm.engine.inputs import EngineInput, InputProcessor, default_sampling_params, find_eos_token_ids
from jaxllm.engine.prompts import split_prompts
from jaxllm.sampling.params import SamplingParams

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<s>{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.arguments.city }}]"
    "{% endfor %}</s>{% endfor %}{% if tools %}tools:{{ tools[0].function.name }}{% endif %}"
    "{{ extra or '' }}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = tokenizers_made.byte_fallback()  # adds its beginning of sequence to prompts
    made.chat_template = TEMPLATE
    return made


def eos() -> int:
    return tokenizer().get_vocab()["</s>"]


def processor(**changes: Any) -> InputProcessor:
    known: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "vocab_size": len(tokenizer()),
        "max_model_len": 40,
        "max_logprobs": 5,
        "eos_token_ids": {eos()},
    }
    return InputProcessor(**(known | changes))


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**values)


# Prompts


def test_text_gets_the_tokenizers_special_tokens() -> None:
    made = processor().make("the cat")
    assert made.prompt == "the cat"
    assert made.prompt_token_ids == tuple(tokenizer().encode("the cat"))
    assert made.prompt_token_ids[0] == tokenizer().bos_token_id
    plain = processor().make("the cat", add_special_tokens=False)
    assert plain.prompt_token_ids == made.prompt_token_ids[1:]


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 4],
        (3, 4),
        [np.int32(3), 4],
        {"prompt_token_ids": [3, 4]},
        {"prompt_token_ids": np.array([3, 4])},
    ],
)
def test_token_ids_are_taken_as_they_are(prompt: Any) -> None:
    made = processor().make(prompt)
    assert made.prompt_token_ids == (3, 4)
    assert made.prompt is None
    assert all(type(token_id) is int for token_id in made.prompt_token_ids)


def test_a_dict_may_bring_text_and_a_salt_along() -> None:
    made = processor().make({"prompt": "hi", "prompt_token_ids": [3], "cache_salt": "tenant"}, priority=-2)
    assert (made.prompt, made.prompt_token_ids, made.cache_salt, made.priority) == ("hi", (3,), "tenant", -2)


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("text", 1),
        ([1, 2], 1),
        ({"prompt": "x"}, 1),
        (["a", "b"], 2),
        ([[1], [2, 3]], 2),
        ([{"prompt": "x"}, "y", [1]], 3),
        ([], 0),
        ([[]], 1),
        ([True, 2], 1),
    ],
)
def test_one_prompt_or_several(prompts: Any, count: int) -> None:
    assert len(split_prompts(prompts)) == count


def test_a_batch_has_one_set_of_parameters_or_one_for_each() -> None:
    few, many = params(max_tokens=1), params(max_tokens=2)
    made = processor().make_batch(["a", [4]], few, priority=[1, 2])
    assert [(m.max_tokens, m.priority) for m in made] == [(1, 1), (1, 2)]
    assert [m.max_tokens for m in processor().make_batch(["a", "b"], [few, many])] == [1, 2]
    with pytest.raises(ValueError, match=r"sampling_params: 1 given for 2 prompts"):
        processor().make_batch(["a", "b"], [few])


def test_a_bad_prompt_in_a_batch_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt_token_ids: -1"):
        processor().make_batch([[1], [-1]])


def test_truncation_keeps_the_end() -> None:
    ids = list(range(1, 60))
    assert processor().make(ids, truncate_prompt_tokens=3).prompt_token_ids == (57, 58, 59)
    made = processor().make(ids, params(max_tokens=10), truncate_prompt_tokens=-1)
    assert made.prompt_token_ids == tuple(ids[-30:])
    made = processor().make(ids, params(max_tokens=None), truncate_prompt_tokens=-1)
    assert (len(made.prompt_token_ids), made.max_tokens) == (39, 1)
    made = processor().make(ids, params(max_tokens=1000), truncate_prompt_tokens=-1)
    assert (len(made.prompt_token_ids), made.max_tokens) == (1, 39)


# Parameters


def test_what_cannot_fit_is_not_even_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = processor()

    def encode(*_args: Any, **_options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(type(inputs.tokenizer), "encode", encode)
    for options in ({}, {"truncate_prompt_tokens": 3}):
        with pytest.raises(ValueError, match=r"prompt: 1000000 characters; more than .* do not fit"):
            inputs.make("a" * 1_000_000, **options)


def test_output_ends_where_the_models_length_does() -> None:
    for asked, given in ((5, 5), (37, 37), (1000, 37), (None, 37)):
        assert processor().make([1, 2, 3], params(max_tokens=asked)).max_tokens == given
    assert processor().make([1] * 39, params(max_tokens=5)).max_tokens == 1


def test_stop_tokens() -> None:
    made = processor().make([1], params(stop_token_ids=[7, 9]))
    assert made.eos_token_ids == {eos()}
    assert made.stop_token_ids == {7, 9}
    made = processor().make([1], params(stop_token_ids=[7], ignore_eos=True))
    assert (made.eos_token_ids, made.stop_token_ids) == (frozenset(), {7})


def test_bad_words_at_the_beginning_and_after_a_space() -> None:
    made = tokenizers_made.byte_level()
    known = processor(tokenizer=made, vocab_size=len(made))

    def spelled(word: str) -> tuple[int, ...]:
        return tuple(made.encode(word))

    # Without merges a space is a token of its own, which needs no sequence of its own.
    assert known.make([1], params(bad_words=["cat"])).bad_word_ids == (spelled("cat"),)
    sentencepiece = processor().make([1], params(bad_words=[" s", "s"])).bad_word_ids
    assert sentencepiece == (tuple(tokenizer().encode("s", add_special_tokens=False)),)


def test_bad_words_with_the_space_inside_their_first_token() -> None:
    made = tokenizers_made.byte_level()
    made.add_tokens(["cat", " cat"])
    known = processor(tokenizer=made, vocab_size=len(made))
    vocab = made.get_vocab()
    assert known.make([1], params(bad_words=["cat"])).bad_word_ids == ((vocab["cat"],), (vocab[" cat"],))


def test_counts_of_logprobs() -> None:
    size = len(tokenizer())
    made = processor().make([1], params(logprobs=0, prompt_logprobs=5))
    assert (made.num_logprobs, made.num_prompt_logprobs) == (0, 5)
    made = processor(max_logprobs=-1).make([1], params(logprobs=-1))
    assert (made.num_logprobs, made.num_prompt_logprobs) == (size, None)
    assert processor(max_logprobs=10**6).make([1], params(logprobs=-1)).num_logprobs == size


def test_defaults_come_from_generation_config() -> None:
    given = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_new_tokens": 7,
        "eos_token_id": [1, 2],
        "do_sample": True,
        "min_p": None,
    }
    defaults = default_sampling_params(given)
    assert defaults == params(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1, max_tokens=7)
    known = processor(default_params=defaults)
    assert known.make([1]).max_tokens == 7
    assert known.make([1], params()).params == params()
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p=7"):
        default_sampling_params({"top_p": 7})


def test_end_of_sequence_tokens_of_all_sources() -> None:
    assert find_eos_token_ids(tokenizer(), {"eos_token_id": [5, 6]}, {"eos_token_id": 9}) == {5, 6, eos()}
    assert find_eos_token_ids(tokenizer(), {}, {"eos_token_id": 9}) == {eos()}
    assert find_eos_token_ids(None, {}, {"eos_token_id": [9, 8]}) == {8, 9}
    assert find_eos_token_ids(None, {"eos_token_id": 3}, {}) == {3}
    assert find_eos_token_ids(None, {}, {}) == frozenset()


# Refusals


BAD: dict[str, tuple[Callable[[Any], EngineInput], type[Exception], str]] = {
    "no tokens": (lambda p: p.make([]), ValueError, "prompt: it has no tokens"),
    "no text": (lambda p: p.make("", add_special_tokens=False), ValueError, "prompt: it has no tokens"),
    "outside": (lambda p: p.make([1, 10**6]), ValueError, r"prompt_token_ids: 1000000 .* from 0 to \d+"),
    "negative": (lambda p: p.make([-1]), ValueError, "prompt_token_ids: -1 not in the model's vocabulary"),
    "bool": (lambda p: p.make([True, False]), TypeError, "prompt_token_ids: True is not a whole number"),
    "float": (lambda p: p.make([1.0]), TypeError, "prompt_token_ids: 1.0 is not a whole number"),
    "mixed": (lambda p: p.make([1, "a"]), TypeError, "prompt_token_ids: 'a'"),
    "too long": (
        lambda p: p.make([1] * 40),
        ValueError,
        "prompt: 40 tokens and one more .*max_model_len=40.*truncate_prompt_tokens.*larger max_model_len",
    ),
    "truncation 0": (lambda p: p.make([1], truncate_prompt_tokens=0), ValueError, "truncate_prompt_tokens=0"),
    "a number": (lambda p: p.make(5), TypeError, "prompt: int is not a prompt; give a string"),
    "bytes": (lambda p: p.make(b"hi"), TypeError, "prompt: bytes is not a prompt"),
    "none": (lambda p: p.make(None), TypeError, "prompt: NoneType is not a prompt"),
    "lone surrogate": (lambda p: p.make("\ud800"), ValueError, "prompt: not valid Unicode"),
    "unknown key": (
        lambda p: p.make({"prompt": "x", "multi_modal_data": {}}),
        ValueError,
        r"unknown keys \['multi_modal_data'\]; known are prompt, prompt_token_ids, cache_salt",
    ),
    "empty dict": (lambda p: p.make({}), ValueError, 'needs "prompt" or "prompt_token_ids"'),
    "text of a dict": (lambda p: p.make({"prompt": [1]}), TypeError, "must be a string, not list"),
    "ids of a dict": (lambda p: p.make({"prompt_token_ids": "x"}), TypeError, "list of token ids, not str"),
    "salt": (lambda p: p.make({"prompt": "x", "cache_salt": ""}), ValueError, "cache_salt=''"),
    "priority": (lambda p: p.make([1], priority=1.5), TypeError, "priority: 1.5"),
    "params": (lambda p: p.make([1], {"top_p": 1}), TypeError, "sampling_params: must be .*, not dict"),
    "logprobs": (lambda p: p.make([1], params(logprobs=6)), ValueError, "logprobs=6: at most 5.*max_lo"),
    "all logprobs": (lambda p: p.make([1], params(logprobs=-1)), ValueError, "logprobs=-1: at most 5"),
    "prompt logprobs": (lambda p: p.make([1], params(prompt_logprobs=9)), ValueError, "prompt_logprobs=9"),
    "allowed": (lambda p: p.make([1], params(allowed_token_ids=[900])), ValueError, "allowed_token_ids: 900"),
    "bias": (lambda p: p.make([1], params(logit_bias={10**6: 1.0})), ValueError, "logit_bias: 1000000"),
    "stop token": (lambda p: p.make([1], params(stop_token_ids=[10**6])), ValueError, "stop_token_ids: 1000"),
    "many outside": (lambda p: p.make(list(range(900, 909))), ValueError, r"900, 901, 902, 903, 904, \.{3}"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_the_field_and_the_fix(case: str) -> None:
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        make(processor())


NO_TOKENIZER: dict[str, tuple[Callable[[InputProcessor], Any], str]] = {
    "text": (lambda p: p.make("hi", params(detokenize=False)), "prompt: text needs .*prompt_token_ids"),
    "stop": (lambda p: p.make([1], params(stop=["x"])), "stop: stop strings need .*stop_token_ids"),
    "detokenize": (lambda p: p.make([1], params()), "detokenize=True: .*; pass detokenize=False"),
    "bad words": (
        lambda p: p.make([1], params(bad_words=["x"], detokenize=False)),
        "bad_words: words need a tokenizer",
    ),
    "chat": (lambda p: p.render_chat([{"role": "user", "content": "x"}]), "a chat needs a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_TOKENIZER)
def test_what_needs_a_tokenizer_says_so(case: str) -> None:
    make, message = NO_TOKENIZER[case]
    with pytest.raises(ValueError, match=message):
        make(processor(tokenizer=None))


def test_without_a_tokenizer_the_defaults_make_no_text() -> None:
    made = processor(tokenizer=None, default_params=params(top_k=3)).make([1])
    assert made.params == params(top_k=3, detokenize=False)


# Chats

CHAT = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


def test_a_chat_is_rendered_and_gets_no_more_special_tokens() -> None:
    rendered = processor().render_chat(CHAT)
    assert rendered.get("prompt") == "<s>system:be</s><s>user:hi</s><s>assistant:"
    made = processor().make(rendered)
    assert made.prompt == rendered.get("prompt")
    assert made.prompt_token_ids == tuple(tokenizer().encode(made.prompt or "", add_special_tokens=False))
    assert made.prompt_token_ids.count(tokenizer().bos_token_id) == 3


def test_what_a_template_is_given() -> None:
    def text(messages: Any, **options: Any) -> str | None:
        return processor().render_chat(messages, **options).get("prompt")

    assert text(CHAT, add_generation_prompt=False) == "<s>system:be</s><s>user:hi</s>"
    continued = [*CHAT, {"role": "assistant", "content": "I"}]
    assert text(continued, add_generation_prompt=False, continue_final_message=True) == (
        "<s>system:be</s><s>user:hi</s><s>assistant:I"
    )
    assert text(CHAT, chat_template="{{ messages[1].content }}!") == "hi!"
    assert text(CHAT[1:], chat_template_kwargs={"extra": "thinking"}) == "<s>user:hi</s>thinking<s>assistant:"
    tool: Mapping[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    assert text(CHAT[1:], tools=[tool]) == "<s>user:hi</s>tools:weather<s>assistant:"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text([{"role": "user", "content": parts}]) == "<s>user:a\nb</s><s>assistant:"
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    asked = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert text(asked, add_generation_prompt=False) == "<s>assistant:[Rome]</s>"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}  # as it was


BAD_CHATS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "not a list": ("hi", {}, TypeError, "messages: must be a list"),
    "one message": (CHAT[0], {}, TypeError, "messages: must be a list"),
    "empty": ([], {}, ValueError, "messages: there are none"),
    "strings": (["hi"], {}, TypeError, r"messages\[0\]: must be"),
    "no role": ([{"content": "x"}], {}, ValueError, r'messages\[0\]: needs a "role"'),
    "template's no": ([{"role": "wizard", "content": "x"}], {}, ValueError, "chat template: .*role wizard"),
    "syntax": (CHAT, {"chat_template": "{% if %}"}, ValueError, "chat template: TemplateSyntaxError"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        {},
        ValueError,
        r"messages\[0\]\.content: a part of type 'image_url' is not supported",
    ),
    "content": ([{"role": "user", "content": 5}], {}, TypeError, r"messages\[0\]\.content: .* not int"),
    "both ends": (CHAT, {"continue_final_message": True}, ValueError, "continue_final.*add_generation"),
    "clash": (CHAT, {"chat_template_kwargs": {"tools": []}}, ValueError, "chat_template_kwargs.*'tools'"),
    "arguments": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        {},
        ValueError,
        r"messages\[0\]\.tool_calls: arguments of 'f' are not JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_chats_are_refused(case: str) -> None:
    messages, options, kind, message = BAD_CHATS[case]
    with pytest.raises(kind, match=message):
        processor().render_chat(messages, **options)


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(ValueError, match=r"no chat template.*pass chat_template=.*generate\(\)"):
        processor(tokenizer=tokenizers_made.words()).render_chat(CHAT)
