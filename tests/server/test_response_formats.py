"""Answers held to schemas, regular expressions and grammars, as OpenAI's and vLLM's clients ask for them."""

import json
import re
import threading
import time
from typing import Any, Literal

import openai
import pydantic
import pytest
from running import Running

from jaxllm.structured import grammar
from jaxllm.structured.grammar import Grammar

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


class Reading(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    place: Literal["in", "out"]
    degrees: int = pydantic.Field(ge=-50, le=60)


SCHEMA = Reading.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "reading", "schema": SCHEMA, "strict": True}}

SEVEN = {"type": "json_schema", "json_schema": {"const": 7}}
TAG = {"type": "tag", "begin": "<a>", "content": SEVEN, "end": "</a>"}
OLDER_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "a>", "schema": {"const": 7}, "end": "<!>"}],
    "triggers": ["a"],
}


def refusal(response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_chats_with_a_schema(server: Running) -> None:
    """OpenAI's client reads the answer into the class that the schema is made from."""
    for seed in range(5):
        answer = server.openai.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Reading, seed=seed, max_tokens=60
        )
        assert isinstance(answer.choices[0].message.parsed, Reading)
        assert answer.choices[0].finish_reason == "stop"


def test_a_stream_with_a_schema(server: Running) -> None:
    chunks = server.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=FORMAT, seed=1, max_tokens=60, stream=True
    )
    Reading.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_any_json_object(server: Running) -> None:
    fields = {"response_format": {"type": "json_object"}, "logit_bias": {"95": 50}, "max_tokens": 40}
    answer = server.post(CHAT, messages=MESSAGES, seed=3, **fields).json()["choices"][0]
    assert answer["message"]["content"].lstrip().startswith("{")
    assert server.post(CHAT, messages=MESSAGES, max_tokens=2, response_format={"type": "text"}).is_success


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "(" root ")" | "x"'}, "max_tokens": 60}, r"\(*x?\)*"),
        ({"structured_outputs": {"json": {"const": [1]}, "disable_any_whitespace": True}}, r"\[1\]"),
        ({"guided_regex": "[ab]{4}"}, "[ab]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "a" | "b"'}, "a|b"),
        ({"guided_json": json.dumps({"enum": [7]})}, "7"),
        ({"guided_json": {"enum": [[7]]}, "guided_whitespace_pattern": "~?"}, "~?".join(["\\[", "7", "\\]"])),
        ({"response_format": FORMAT, "max_tokens": 60}, r"\{.*\}"),
        ({"response_format": {"type": "structural_tag", "format": TAG}}, "<a>7</a>"),
        ({"structured_outputs": {"structural_tag": {"format": TAG}}}, "<a>7</a>"),
        ({"structural_tag": json.dumps({"type": "structural_tag", "format": TAG})}, "<a>7</a>"),
        ({"response_format": OLDER_TAG, "logit_bias": {"15": 100}}, "(a>7<!>)+[a>7<!]*"),  # of the a
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_way_to_ask(server: Running, path: str, fields: dict, pattern: str) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": ["a", "b"]}
    answer = server.post(path, **{"seed": 5, "n": 2, "max_tokens": 20, **fields}, **prompt).json()
    for choice in answer["choices"]:
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert re.fullmatch(pattern, text, re.DOTALL), text


def test_responses(server: Running) -> None:
    wanted = {"type": "json_schema", "name": "reading", "schema": SCHEMA, "strict": True}
    answer = server.post(RESPONSES, input="hi", text={"format": wanted}, max_output_tokens=60).json()
    Reading.model_validate_json(answer["output"][0]["content"][0]["text"])
    assert answer["text"]["format"] == wanted
    parsed = server.openai.responses.parse(
        model="tiny", input="hi", text_format=Reading, max_output_tokens=60
    )
    assert isinstance(parsed.output_parsed, Reading)
    plain = server.post(RESPONSES, input="hi", max_output_tokens=1).json()
    assert plain["text"]["format"] == {"type": "text"}
    anything = {"format": {"type": "json_object"}}
    assert server.post(RESPONSES, input="hi", text=anything, max_output_tokens=3).is_success


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema: must be given"),
        ({"response_format": {"type": "xml"}}, "response_format", "type"),
        ({"response_format": "json_object"}, "response_format", ""),
        ({"response_format": schema_format({}, name="two words")}, "response_format", "name"),
        ({"response_format": schema_format([1])}, "response_format", "schema"),
        ({"response_format": schema_format({"not": {}})}, "response_format", 'Unimplemented keys: ["not"]'),
        ({"response_format": schema_format({"$ref": "#"})}, "response_format", "no text that fits"),
        ({"response_format": schema_format({"type": 5})}, "response_format", "response_format: type must"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "format: is missing"),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            "response_format",
            "format.type: None",
        ),
        ({"response_format": OLDER_TAG | {"triggers": ["b"]}}, "response_format", "structures[0].begin"),
        ({"response_format": {"type": "text", "format": TAG}}, "response_format", "only with type"),
        ({"structural_tag": "["}, "structural_tag", "not JSON"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex, choice"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"shape": 1}}, "structured_outputs", "shape"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "json: not JSON"),
        ({"guided_regex": "("}, "guided_regex", "guided_regex: "),
        ({"guided_regex": ""}, "guided_regex", "guided_regex: must not be empty"),
        ({"guided_json": "[]"}, "guided_json", "must be an object"),
        ({"guided_choice": []}, "guided_choice", "at least one"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_regex", "whitespace_pattern: only"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "only with guided_json"),
        ({"guided_regex": "a", "response_format": FORMAT}, "guided_regex", "can be held to one of them"),
        ({"guided_grammar": "x" * 70_000}, "guided_grammar", "at most 65536"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bad_constraints(server: Running, path: str, fields: dict, param: str, said: str) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "a"}
    error = refusal(server.post(path, **prompt, **fields))
    assert error["param"] == param
    assert said in error["message"]
    assert "Value error" not in error["message"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema", "schema": {}},
        {"type": "json_schema", "name": "x"},
        {"type": "json_object", "name": "x", "schema": {}},
        {"type": "json_schema", "name": "x", "schema": {"not": {}}},
        {"type": "xml"},
    ],
)
def test_bad_formats_of_responses(server: Running, wanted: dict) -> None:
    assert refusal(server.post(RESPONSES, input="hi", text={"format": wanted}))["param"] == "text"


HOSTILE: dict[str, dict[str, Any]] = {
    "nested quantifiers": {"regex": "((((a{1,900}){1,900}){1,900}){1,900}){1,900}b"},
    "a state for every past": {"regex": "(.*a.{60}){60}b"},
    "nothing that ends": {
        "json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "cases of cases": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"{i}{j}": {"type": "integer"}}} for j in range(9)]}
                for i in range(9)
            ]
        }
    },
    "large multiples": {"json": {"type": "integer", "multipleOf": 99999989}},
    "deep brackets": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "many rules": {
        "grammar": "\n".join(["start: r0", *(f"r{i}:r{i + 1}" for i in range(5000)), "r5000: r0"])
    },
    "huge": {"choice": [f"choice number {i}" for i in range(4200)]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_alone(server: Running, name: str) -> None:
    """They are refused, or fail, or end at their length; and whoever else asks is answered meanwhile."""
    plain = {"prompt": "a", "max_tokens": 20, "temperature": 0}
    expected = server.post(COMPLETIONS, **plain).json()["choices"]
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(
            server.post(COMPLETIONS, prompt="a", max_tokens=40, structured_outputs=HOSTILE[name])
        )
    )
    asking.start()
    assert server.post(COMPLETIONS, **plain).json()["choices"] == expected
    asking.join()
    if found[0].status_code == 200:
        assert name in ("nested quantifiers", "a state for every past")
        choice = found[0].json()["choices"][0]
        assert choice["finish_reason"] == "length" or re.fullmatch("a+b", choice["text"])
    else:
        assert refusal(found[0])["param"] == "structured_outputs"
    assert server.post(COMPLETIONS, **plain).json()["choices"] == expected
    server.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_fails_on_the_way(
    server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = grammar.LLParserLimits(max_lexer_states=40, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    pattern = f"([a-z]*q[a-z]{{7}}|[a-z ]{{{38 + stream}}})x"
    fields: dict[str, Any] = {"prompt": "a", "max_tokens": 40, "seed": 0, "stream": stream}
    response = server.post(COMPLETIONS, **fields, structured_outputs={"regex": pattern})
    if stream:
        assert "structured_outputs.regex: nothing can follow" in response.text
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert "nothing can follow" in refusal(response)["message"]
    server.wait_idle()


def held_back(monkeypatch: pytest.MonkeyPatch, regex: str) -> threading.Event:
    """Makes the grammar of an expression wait for the event."""
    release, make = threading.Event(), Grammar.__init__

    def slow(self, tokens, params, *others) -> None:
        if params.regex == regex:
            release.wait(20)
        make(self, tokens, params, *others)

    monkeypatch.setattr(Grammar, "__init__", slow)
    return release


def test_a_slow_grammar_stops_nobody(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    release = held_back(monkeypatch, "slow")
    found: list[Any] = []
    body = {"prompt": "a", "max_tokens": 9, "structured_outputs": {"regex": "slow"}}
    askers = [
        threading.Thread(target=lambda: found.append(server.post(COMPLETIONS, **body))) for _ in range(12)
    ]
    for asker in askers:
        asker.start()
    begin = time.monotonic()
    assert server.post(COMPLETIONS, prompt="a", max_tokens=9).is_success
    other = server.post(COMPLETIONS, prompt="a", max_tokens=9, structured_outputs={"regex": "quick"})
    assert other.json()["choices"][0]["text"] == "quick"
    assert time.monotonic() - begin < 10
    assert not found
    release.set()
    for asker in askers:
        asker.join()
    assert [response.json()["choices"][0]["text"] for response in found] == ["slow"] * 12


def test_a_client_that_leaves_takes_nobody_along(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two wait for the same grammar, and one gives up."""
    release = held_back(monkeypatch, "patience")
    body = {"prompt": "a", "max_tokens": 9, "structured_outputs": {"regex": "patience"}}
    found: list[Any] = []
    asker = threading.Thread(target=lambda: found.append(server.post(COMPLETIONS, **body)))
    asker.start()
    with pytest.raises(openai.APITimeoutError):
        server.openai.with_options(timeout=0.3).completions.create(
            model="tiny", prompt="a", max_tokens=9, extra_body={"structured_outputs": {"regex": "patience"}}
        )
    release.set()
    asker.join()
    assert found[0].json()["choices"][0]["text"] == "patience"
    server.wait_idle()
