"""Prompts with a suffix, in the forms of the families that can fill in the middle."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers_made
from running import Running
from transformers import PreTrainedTokenizerFast

from jaxllm.server.errors import ApiError
from jaxllm.server.infilling import FORMS, Infilling


def with_tokens(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.tokens[0])
def test_each_form(form) -> None:
    spaced = form.joined
    tokenizer = tokenizers_made.byte_fallback() if spaced else tokenizers_made.byte_level()
    infilling = Infilling(with_tokens(tokenizer, *form.tokens, form.ends[0]))
    before = [tokenizer.bos_token] if spaced else []
    prompt: Any
    [prompt] = infilling.prompts([{"prompt": "the cat", "cache_salt": "s"}], "cats.")
    begin, hole, end = form.tokens
    words = tokenizer.tokenize("the cat"), tokenizer.tokenize("cats.")[spaced:]  # without the space before it
    assert tokenizer.convert_ids_to_tokens(prompt["prompt_token_ids"]) == [
        *before, begin, *words[0], hole, *words[1], end
    ]  # fmt: skip
    assert prompt["cache_salt"] == "s"
    assert "prompt" not in prompt
    assert infilling.stop_token_ids == tokenizer.convert_tokens_to_ids([form.ends[0]])


def test_a_model_that_cannot_says_so(server: Running) -> None:
    with pytest.raises(ApiError, match="cannot fill in the middle"):
        Infilling(tokenizers_made.byte_level())
    refused = server.post("/v1/completions", prompt="a", suffix="b")
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": "suffix: this model cannot fill in the middle; put all of the text into the prompt",
        "type": "invalid_request_error",
        "param": "suffix",
        "code": "unsupported_by_model",
    }
    assert server.post("/v1/completions", prompt="a", suffix="", max_tokens=1).is_success


@pytest.mark.parametrize(
    "fields", [{"prompt": [1, 2]}, {"prompt": [[1]]}, {"prompt": "a", "echo": True},
               {"prompt": "a", "truncate_prompt_tokens": 3}],
)  # fmt: skip
def test_what_does_not_go_with_a_suffix(server: Running, fields: dict) -> None:
    refused = server.post("/v1/completions", suffix="b", **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")


def test_over_http(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"<fim_prefix>": 10, "<fim_suffix>": 11, "<fim_middle>": 12, "<file_sep>": 13}
    own: Any = server.service.engine.get_tokenizer()
    tokenizer = SimpleNamespace(get_vocab=lambda: own.get_vocab() | ids, encode=own.encode)
    monkeypatch.setattr(server.service, "_infilling", Infilling(tokenizer))
    body = {"prompt": ["ab", "c"], "suffix": "d", "max_tokens": 2, "return_token_ids": True, "stream": False}
    choices = server.post("/v1/completions", **body).json()["choices"]
    a, b, c, d = own.convert_tokens_to_ids(list("abcd"))
    assert choices[0]["prompt_token_ids"] == [1, 10, a, b, 11, d, 12]
    assert choices[1]["prompt_token_ids"] == [1, 10, c, 11, d, 12]
    bare = server.post("/v1/completions", **body, add_special_tokens=False).json()["choices"]
    assert bare[0]["prompt_token_ids"] == [10, a, b, 11, d, 12]
    for name in ("prompt", "suffix"):
        broken = server.http.post(
            "/v1/completions",
            content=json.dumps({"prompt": "a", "suffix": "d", name: "\ud800"}),
            headers={"content-type": "application/json"},
        )
        assert (broken.status_code, broken.json()["error"]["param"]) == (400, name)
    params = {"prompt": "a", "suffix": "d", "max_tokens": 4, "logit_bias": {"13": 100}, "temperature": 0}
    [choice] = server.post("/v1/completions", **params).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", 13, "")
