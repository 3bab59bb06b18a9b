"""What an output is held to: vLLM's names and meanings.

https://docs.vllm.ai/en/stable/features/structured_outputs.html

What can be checked without a tokenizer is checked here, when the parameters are made. Whether a schema, a
regex or a grammar can be compiled shows when the request is added.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Constraint = Literal["json", "regex", "choice", "grammar", "json_object", "structural_tag"]
"""The ways to say what an output may be."""

CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the output must be: exactly one of `json`, `regex`, `choice`, `grammar`, `json_object` and
    `structural_tag`.

    Immutable and hashable: schemas are kept as JSON text, lists as tuples.

    Raises:
        ValueError: no constraint or several, or a value that cannot be one; the message names the field.
        TypeError: a value of the wrong type.
    """

    json: str | dict[str, Any] | type | None = None
    """A JSON schema: as a dict, as JSON text, or a pydantic model's class."""
    regex: str | None = None
    """A regular expression that the whole output matches, without look-around and back-references."""
    choice: Sequence[str] | None = None
    """Strings of which the output is one."""
    grammar: str | None = None
    """A context-free grammar: EBNF as llama.cpp's (rules `name ::= ...`, from `root`), or Lark (rules
    `name: ...`, from `start`), in which `%json {...}` is a JSON schema and `<|name|>` a special token.
    Sources: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md and
    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md."""
    json_object: bool = False
    """Any JSON object."""
    structural_tag: str | dict[str, Any] | None = None
    """Free text, and parts of it between tags that are held to a form, as a dict or as JSON text: XGrammar's
    `{"format": {"type": "triggered_tags", ...}}`, or vLLM's older `{"structures": [...], "triggers": [...]}`
    with structures `{"begin": ..., "schema": ..., "end": ...}`. Formats that are not there, such as those of
    tokens, are refused by name.
    Source: https://xgrammar.mlc.ai/docs/structural_tag/structural_tag.html."""
    disable_additional_properties: bool = False
    """With `json` and `structural_tag`: objects have no other properties than the schema lists, unless it
    speaks of others. By itself a JSON schema allows others where it does not say "additionalProperties":
    false."""
    disable_any_whitespace: bool = False
    """No whitespace between the tokens of JSON, with `json`, `json_object` and `structural_tag`."""
    whitespace_pattern: str | None = None
    """A regular expression of the whitespace that may stand between tokens of JSON, likewise. None: up to 4
    spaces or tabs, or a new line and up to 40."""
    prefix: str | None = None
    """A grammar in Lark of what comes first and is held to nothing else, such as a model's reasoning."""

    def __post_init__(self) -> None:
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _json_text("structural_tag", self.structural_tag))
        for name in ("regex", "grammar", "whitespace_pattern", "prefix"):
            _check_text(name, getattr(self, name))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json_object", "disable_additional_properties", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        self._check_together()

    @property
    def constraint(self) -> Constraint:
        """Which of the constraints is given."""
        return self._given()[0]

    @property
    def size(self) -> int:
        """Bytes of the constraint's text."""
        value = getattr(self, self.constraint)
        texts = value if self.constraint == "choice" else (str(value),)
        return sum(len(text.encode()) for text in texts)

    def _given(self) -> list[Constraint]:
        return [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]

    def _check_together(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: give exactly one of {', '.join(CONSTRAINTS)}; "
                f"given: {', '.join(given) or 'none'}"
            )
        if self.disable_additional_properties and given[0] not in ("json", "structural_tag"):
            text = f"only with json or structural_tag, not with {given[0]}"
            raise ValueError(f"disable_additional_properties: {text}")
        for name in ("disable_any_whitespace", "whitespace_pattern"):
            if getattr(self, name) and given[0] not in ("json", "json_object", "structural_tag"):
                text = f"only with json, json_object or structural_tag, not with {given[0]}"
                raise ValueError(f"{name}: {text}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("whitespace_pattern: must be left out with disable_any_whitespace=True")


def _schema_text(schema: Any) -> str:
    """A schema as JSON text.

    Raises:
        ValueError: it is not JSON, or no object.
        TypeError: it is neither a dict, nor text, nor a class with `model_json_schema`.
    """
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(schema, str | dict):
        raise TypeError(f"json: must be a dict, JSON text or a pydantic model's class, not {schema!r}")
    return _json_text("json", schema)


def _json_text(name: str, value: Any) -> str:
    """An object as JSON text.

    Raises:
        ValueError: it is not JSON, or no object.
        TypeError: it is neither a dict nor text.
    """
    if isinstance(value, str):
        _check_text(name, value)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{name}: must be an object, not {type(value).__name__}")
    if not isinstance(value, dict):
        raise TypeError(f"{name}: must be a dict or JSON text, not {value!r}")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot be written as JSON: {error}") from error
    _check_text(name, text)
    return text


def _check_text(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: must be a string")
    if not value:
        raise ValueError(f"{name}: must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not valid Unicode text: {error}") from error


def _choices(values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"choice={values!r}: must be a list of strings")
    for value in values:
        _check_text("choice", value)
        if value is None:
            raise TypeError("choice has None: must hold strings only")
    if not values:
        raise ValueError("choice: must hold at least one string")
    return tuple(dict.fromkeys(values))
