"""What an output is held to: what is refused before anything is compiled."""

import dataclasses

import pydantic
import pytest

from jaxllm import SamplingParams, StructuredOutputsParams


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_schemas_in_every_form() -> None:
    as_dict = StructuredOutputsParams(json=Person.model_json_schema())
    assert StructuredOutputsParams(json=Person) == as_dict
    assert StructuredOutputsParams(json=as_dict.json) == as_dict
    assert hash(StructuredOutputsParams(json=Person)) == hash(as_dict)


def test_lists_are_kept_as_tuples() -> None:
    params = StructuredOutputsParams(choice=["b", "a", "b"])
    assert params.choice == ("b", "a")
    assert dataclasses.replace(params) == params


@pytest.mark.parametrize(
    ("constraint", "size"), [({"choice": ["é", "ab"]}, 4), ({"regex": "日"}, 3), ({"json": {"a": 1}}, 8)]
)
def test_size(constraint: dict, size: int) -> None:
    assert StructuredOutputsParams(**constraint).size == size


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "exactly one of json, regex"),
        ({"json_object": False}, "given: none"),
        ({"regex": "a", "choice": ["a"]}, "given: regex, choice"),
        ({"json": "{"}, "json: not JSON"),
        ({"json": "[" * 100_000}, "json: not JSON"),
        ({"json": "[]"}, "json: must be an object, not list"),
        ({"json": {"const": float("nan")}}, "json: cannot be written"),
        ({"json": {"const": {1, 2}}}, "json: cannot be written"),
        ({"json": {"const": "\ud800"}}, "json: not valid Unicode"),
        ({"regex": ""}, "regex: must not be empty"),
        ({"regex": "\ud800"}, "regex: not valid Unicode"),
        ({"grammar": ""}, "grammar: must not be empty"),
        ({"choice": []}, "choice: must hold at least one"),
        ({"choice": ["a", ""]}, "choice: must not be empty"),
        ({"json_object": True, "disable_additional_properties": True}, "disable_additional_properties: only"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern: only with json"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "disable_any_whitespace: only with json"),
        (
            {"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "},
            "whitespace_pattern: must be left out",
        ),
    ],
)
def test_bad_values(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        StructuredOutputsParams(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"json": 5},
        {"json": int},
        {"regex": b"a"},
        {"choice": "abc"},
        {"choice": [1]},
        {"choice": [None]},
        {"json_object": 1},
        {"grammar": ["a"]},
    ],
)
def test_wrong_types(fields: dict) -> None:
    with pytest.raises(TypeError, match=next(iter(fields))):
        StructuredOutputsParams(**fields)


def test_sampling_params_take_no_other_form() -> None:
    with pytest.raises(TypeError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})
