"""Command-line flags made from dataclass fields, so that an option is written once, where it is checked.

A flag that is not given leaves nothing behind: a command passes on only what its user said, and defaults stay
where they are defined.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Fields = Iterable[dataclasses.Field[Any]]


def add_flags(
    parser: argparse._ActionsContainer,
    owner: type,
    fields: Fields,
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
    words: bool = False,
) -> None:
    """Adds a flag for each of `fields`, which belong to the dataclass `owner`.

    Help texts are the fields' `metadata["help"]` or the docstrings below them. A list is given by repeating
    its flag, a mapping as a JSON object.

    Args:
        aliases: more names that a field's flag has.
        words: a list may also be given as several words after one flag. Then no such flag may stand before
            an argument that is none.

    Raises:
        TypeError: a field's type has no form on the command line.
    """
    hints, texts = get_type_hints(owner), field_docstrings(owner)
    for f in fields:
        text = f.metadata.get("help") or texts[f.name]
        if f.default not in (None, dataclasses.MISSING, (), ""):
            text += f" (default: {f.default})"
        form = _form(f.name, hints[f.name])
        if words and form.get("action") == "append":
            form |= {"action": "extend", "nargs": "+"}
        names = [flag_name(name) for name in (f.name, *(aliases or {}).get(f.name, ()))]
        help = text.replace("%", "%%")
        parser.add_argument(*names, dest=f.name, default=argparse.SUPPRESS, help=help, **form)


def flag_name(name: str) -> str:
    """`max_num_seqs` is `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def given(arguments: argparse.Namespace, fields: Fields) -> dict[str, Any]:
    """The values of those `fields` whose flags were on the command line."""
    return {f.name: getattr(arguments, f.name) for f in fields if hasattr(arguments, f.name)}


def field_docstrings(owner: type) -> dict[str, str]:
    """The string literals that stand below a class's annotated fields, by the fields' names."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _form(name: str, hint: Any) -> dict[str, Any]:
    """What argparse is told about a type: how often a flag may stand, and how its word is read."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            return {"choices": arguments}
        if origin is Mapping:
            return {"type": _json_object, "metavar": "JSON"}
        if origin is Sequence:
            return {"action": "append", "type": arguments[0], "metavar": arguments[0].__name__.upper()}
    for kind in (bool, float, int, Path, str):
        if kind in kinds:
            return _scalar(kind)
    raise TypeError(f"{name}: {hint} has no form on the command line")


def _scalar(kind: type) -> dict[str, Any]:
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kind, "metavar": kind.__name__.upper()}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"12\": -100}}'")
    return value
