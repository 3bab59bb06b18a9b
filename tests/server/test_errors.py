"""What cannot be served is refused by name, in OpenAI's form, and nothing is let by."""

import contextlib
import json
import re

import httpx2
import openai
import pytest
from running import Running

from jaxllm.server.chat import ChatCompletionRequest
from jaxllm.server.completions import CompletionRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def refusal(response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": [1, 999]}, "prompt"),
        ({"prompt": "a" * 500}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "1"}, "temperature"),
        ({"prompt": "a", "temperature": 0, "n": 2}, "n"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": ["a"] * 17}, "n"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "stop": [1]}, "stop"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "seed": 2**80}, "seed"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": True}}, "stream_options"),
        ({"prompt": "a", "request_id": "no spaces"}, "request_id"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "nonsense": 1}, "nonsense"),
    ],
)
def test_bad_values(server: Running, fields: dict, param: str) -> None:
    headers = {"content-type": "application/json"}
    error = refusal(server.http.post("/v1/completions", content=json.dumps(fields), headers=headers))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite(server: Running, value: str) -> None:
    for field in ("temperature", "top_p", "presence_penalty", "min_p"):
        content = f'{{"prompt": "a", "{field}": {value}}}'
        headers = {"content-type": "application/json"}
        assert (
            refusal(server.http.post("/v1/completions", content=content, headers=headers))["param"] == field
        )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("/v1/chat/completions", name) for name in ChatCompletionRequest.refused),
        *(("/v1/completions", name) for name in CompletionRequest.refused),
    ],
)
def test_what_is_not_served_is_refused_by_name(server: Running, path: str, name: str) -> None:
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "a"}
    asked = {"parallel_tool_calls": 7}.get(name, "something")
    error = refusal(server.post(path, **prompt, **{name: asked}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert server.post(path, **prompt, max_tokens=1, **{name: None}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "somebody", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 30}, "top_logprobs"),
        ({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": MESSAGES, "documents": [{"text": "x"}]}, "documents"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        (
            {"messages": MESSAGES, "stream": True, "stream_options": {"include_obfuscation": True}},
            "include_obfuscation",
        ),
        ({"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_bad_chats(server: Running, fields: dict, param: str) -> None:
    assert refusal(server.post("/v1/chat/completions", **fields))["param"] == param


def test_a_prompt_that_is_too_long_says_so(server: Running) -> None:
    for path, fields in (
        ("/v1/completions", {"prompt": "a" * 500}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 500}]}),
    ):
        assert refusal(server.post(path, **fields))["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "name", "place", "fields"),
    [
        ("/v1/completions", "max_tokens", "prompt", {"prompt": "abc"}),
        ("/v1/completions", "max_tokens", "prompt", {"prompt": "abc", "stream": True}),
        ("/v1/chat/completions", "max_tokens", "messages", {"messages": MESSAGES}),
        ("/v1/chat/completions", "max_completion_tokens", "messages", {"messages": MESSAGES}),
        ("/v1/responses", "max_output_tokens", "input", {"input": "abc"}),
    ],
)
def test_an_output_that_has_no_room_says_so(
    server: Running, path: str, name: str, place: str, fields: dict
) -> None:
    error = refusal(server.post(path, **fields, **{name: 100_000}))
    assert (error["param"], error["code"]) == (name, "context_length_exceeded")
    said = re.fullmatch(
        rf"{name}: This model's maximum context length is 128 tokens. However, you requested (\d+) tokens "
        rf"\((\d+) in the {place}, 100000 in the completion\). Please reduce the length of the {place} or "
        r"completion.",
        error["message"],
    )
    assert said
    total, prompt = map(int, said.groups())
    assert total == prompt + 100_000
    assert refusal(server.post(path, **fields, **{name: 129 - prompt}))["param"] == name
    assert server.post(path, **fields, **{name: 128 - prompt}, temperature=0).is_success


def test_an_output_whose_length_is_not_asked_for_has_the_room_there_is(server: Running) -> None:
    found = server.post("/v1/completions", prompt="a" * 120).json()
    assert found["usage"]["total_tokens"] <= 128
    found = server.post("/v1/chat/completions", messages=MESSAGES, ignore_eos=True).json()
    assert found["usage"]["total_tokens"] == 128


def test_of_several_prompts_the_one_without_room_is_named(server: Running) -> None:
    error = refusal(server.post("/v1/completions", prompt=["a", "a" * 100], max_tokens=60))
    assert error["message"].startswith("prompt 1: max_tokens: This model's maximum context length")


def test_the_client_sees_its_own_exceptions(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.openai.completions.create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        server.openai.completions.create(model="other", prompt="a")


def test_bodies_that_are_not_requests(server: Running) -> None:
    http, headers = server.http, {"content-type": "application/json"}

    def send(content: bytes, path: str = "/v1/completions"):
        return http.post(path, content=content, headers=headers)

    assert refusal(send(b"{"))["code"] == "invalid_json"
    assert refusal(send(b"[]"))["message"] == "the body: must be a JSON object"
    refusal(send(b'"text"'))
    refusal(send(b"\xff\xfe"))
    refusal(send(b'{"prompt": "a", "user": ' + b"[" * 40_000 + b"]" * 40_000 + b"}"))
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
            error = refusal(http.post(path, content=b'{"prompt": "a"}', headers=kind))
            assert error["param"] == "content-type"
            assert "application/json" in error["message"]
    refusal(send(b'{"prompt": "' + b"a" * 100_000 + b'"}'), 413)
    refusal(http.post("/v1/completions", content=iter([b"x" * 60_000] * 2), headers=headers), 413)
    refusal(http.get("/v1/nothing"), 404)
    refusal(http.get("/v1/completions"), 405)
    assert server.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200


def test_what_the_model_cannot_do_says_so(server: Running) -> None:
    for path in ("/v1/embeddings", "/pooling", "/classify", "/score", "/rerank", "/v1/score", "/v2/rerank"):
        assert refusal(server.post(path, input="a"))["code"] == "unsupported_by_model"


def test_giant_headers(server: Running) -> None:
    refusal(server.http.get("/health", headers={"x-large": "x" * 100_000}), 431)
    with contextlib.suppress(httpx2.NetworkError):  # the answer may be lost with the connection
        assert server.http.get("/health", headers={"x-large": "x" * 2_000_000}).status_code == 400
    assert server.http.get("/health").status_code == 200


def test_a_template_that_fails_fails_alone(server: Running) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}]).is_success
    error = refusal(server.post("/v1/chat/completions", messages=[{"role": "user", "content": 7}]))
    assert error["param"] == "messages"
