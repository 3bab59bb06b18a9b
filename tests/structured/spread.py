"""A spread of JSON schemas and regular expressions, each made of several features; the same in every run."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
NAMES = ["id", "name", "größe", "价格", "is_open", "two words", 'quo"te', "back\\slash", "a/b", "ключ", "🙂"]
FORMATS = ["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname"]
PATTERNS = [
    "^[a-z]{2,6}$",
    "^[A-Z]{3}-[0-9]{1,4}$",
    "^(red|green|blue)+$",
    "[0-9]{3}",
    "^#[0-9a-f]{6}$",
    "^[äöüß]{1,4}$",
    r"^\+[1-9][0-9]{1,6}$",
]


def schemas(count: int) -> list[Schema]:
    """Schemas of all kinds in turn, with whatever comes inside of them."""
    made = []
    for seed in range(count):
        rng = random.Random(seed)
        kind = TOP[seed % len(TOP)]
        made.append(kind(rng, 2))
    return made


def _any(rng: random.Random, depth: int) -> Schema:
    return rng.choice(KINDS if depth > 0 else FLAT)(rng, depth)


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.choice([-1000, -7, 0, 1, 17])
    schema: Schema = {"type": "integer"}
    if rng.random() < 0.9:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.9:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([3, 10, 99, 12345])
    if rng.random() < 0.2:
        return {"type": "integer", "minimum": 0, "maximum": 9999, "multipleOf": rng.choice([2, 5, 25, 60])}
    return schema


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.choice([-2.5, 0, 0.125, 10])
    bounds = [
        {"minimum": low, "maximum": low},
        {"minimum": low, "maximum": low + 7.75, "multipleOf": 0.125},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + 100, "multipleOf": 0.5},
    ]
    return {"type": "number", **(rng.choice(bounds) if rng.random() < 0.9 else {})}


def _string(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 12)}


def _pattern(rng: random.Random, depth: int) -> Schema:
    pattern = rng.choice(PATTERNS)
    limit = {} if pattern.endswith("$") else {"maxLength": 8}
    return {"type": "string", "pattern": pattern, **limit}


def _format(rng: random.Random, depth: int) -> Schema:
    kind = rng.choice(FORMATS)
    return {"type": "string", "format": kind, **({"maxLength": 24} if kind in ("email", "hostname") else {})}


def _enum(rng: random.Random, depth: int) -> Schema:
    texts = ["red", "grün", "赤", "two words", 'say "hi"', "a\\b", "line\nbreak"]
    return {"enum": rng.sample([*texts, 1, -2.5, None, True, [1, "x"]], rng.randrange(1, 6))}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["fixed", "né", 42, False, None, [1, 2], {"a": "b"}])}


def _literal(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"], ["string", "null"]])}


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    return {
        "type": "array",
        "items": _any(rng, depth - 1),
        "minItems": low,
        "maxItems": low + rng.randrange(1, 3),
    }


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_any(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _map(rng: random.Random, depth: int) -> Schema:
    return {
        "type": "object",
        "properties": {"kind": _const(rng, 0)},
        "required": ["kind"],
        "additionalProperties": rng.choice([_integer, _literal])(rng, 0),
        "maxProperties": 3,
    }


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def _tagged(rng: random.Random, depth: int) -> Schema:
    def case(tag: str) -> Schema:
        properties = {"tag": {"const": tag}, "value": _any(rng, depth - 1)}
        return {
            "type": "object",
            "properties": properties,
            "required": ["tag", "value"],
            "additionalProperties": False,
        }

    return {"oneOf": [case("a"), case("b")]}


def _all_of(rng: random.Random, depth: int) -> Schema:
    return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": rng.choice([3, 50, 4711])}]}


def _referred(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, 2)
    return {
        "$defs": {"item": _any(rng, depth - 1)},
        "type": "object",
        "properties": {name: {"$ref": "#/$defs/item"} for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _recursive(rng: random.Random, depth: int) -> Schema:
    tree = {
        "type": "object",
        "properties": {
            "value": rng.choice(FLAT)(rng, 0),
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}


Kind = Callable[[random.Random, int], Schema]
FLAT: list[Kind] = [_integer, _number, _string, _pattern, _format, _enum, _const, _literal]
NESTED: list[Kind] = [_array, _tuple, _object, _map, _any_of, _tagged, _all_of]
KINDS: list[Kind] = [*FLAT, *NESTED, _object, _array]
TOP: list[Kind] = [*KINDS, _referred, _recursive]


def regexes(count: int) -> list[str]:
    """Regular expressions that Python and Rust read alike."""
    return [_regex(random.Random(seed), seed % 3) for seed in range(count)]


def _regex(rng: random.Random, depth: int) -> str:
    return "".join(_piece(rng, depth) for _ in range(rng.randrange(1, 4)))


def _piece(rng: random.Random, depth: int) -> str:
    classes = ["[a-z]", "[A-F0-9]", "[^aeiou\\n]", "[äöü]", "."]
    simple = [*classes, "abc", "x", "\\.", "\\+", "é", "日本", "🙂", " ", "\\-"]
    piece = rng.choice(simple)
    if depth > 0 and rng.random() < 0.3:
        piece = "(" + "|".join(_regex(rng, depth - 1) for _ in range(rng.randrange(1, 4))) + ")"
    elif len(piece) > 1 and piece[0] not in "[\\":
        piece = f"(?:{piece})"
    return piece + rng.choice(["", "", "", "", "?", "{2}", "{1,3}", "{0,2}", "{0,4}", "*", "+"])
