"""Flags for what an output is held to."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.structured import StructuredOutputsParams

_FIELDS = {
    "json_schema": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar_file": "grammar",
    "json_object": "json_object",
    "structural_tag": "structural_tag",
}
"""Fields of `StructuredOutputsParams` by the flags' names; `--json` says how a command prints."""


def add_constraint_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each way to say what an output must be."""
    group = parser.add_argument_group("structured output", "What the whole output must be: one of these.")
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    text = "JSON of the schema in this file, or of this one: '{...}'"
    group.add_argument("--json-schema", metavar="FILE", help=text, **options)
    group.add_argument("--regex", metavar="REGEX", help="text that matches a regular expression", **options)
    group.add_argument(
        "--choice", metavar="TEXT", action="append", help="one of the texts given with this flag", **options
    )
    group.add_argument(
        "--grammar-file", metavar="FILE", help="text of a grammar, EBNF or Lark, in this file", **options
    )
    group.add_argument("--json-object", action="store_true", help="any JSON object", **options)
    group.add_argument(
        "--structural-tag",
        metavar="FILE",
        help="free text with parts between tags that are held to a form: JSON in this file, or '{...}'",
        **options,
    )


def constraint_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameter `structured_outputs`, if a flag was given; a bad one is an error of usage."""
    found = {field: getattr(arguments, flag) for flag, field in _FIELDS.items() if hasattr(arguments, flag)}
    if not found:
        return {}
    try:
        for field in ("json", "grammar", "structural_tag"):
            if field in found and not found[field].lstrip().startswith("{"):
                found[field] = Path(found[field]).read_text(encoding="utf-8")
        return {"structured_outputs": StructuredOutputsParams(**found)}
    except OSError as error:
        arguments.usage_error(arguments.parser.explain(error, arguments))
        raise
    except (TypeError, ValueError) as error:
        arguments.usage_error(str(error))
        raise


def for_server(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters as JSON."""
    structured = sampling.get("structured_outputs")
    if structured is None:
        return dict(sampling)
    given = {f.name: getattr(structured, f.name) for f in dataclasses.fields(structured)}
    return {**sampling, "structured_outputs": {k: v for k, v in given.items() if v not in (None, False)}}
