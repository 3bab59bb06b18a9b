"""Structural tags: free text, and parts of it between tags that are held to a form.

XGrammar's names and meanings: https://xgrammar.mlc.ai/docs/structural_tag/structural_tag.html.
vLLM's older form has `structures` and `triggers`:
https://docs.vllm.ai/en/stable/features/structured_outputs.html.
Both become a grammar in Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Part = Literal["json", "regex", "grammar"]
"""What has a grammar of its own."""
After = tuple[str, ...] | None
"""What comes after a format: nothing (), one of these texts, or another format (None)."""
Given = dict[str, Any]

ANY = r"/(.|\n)*/"
FIELDS: dict[str, dict[str, tuple[type, Any]]] = {
    "const_string": {"value": (str, ...)},
    "json_schema": {"json_schema": (dict, ...), "style": (str, "json")},
    "regex": {"pattern": (str, ...)},
    "grammar": {"grammar": (str, ...)},
    "any_text": {"excludes": (list, [])},
    "sequence": {"elements": (list, ...)},
    "or": {"elements": (list, ...)},
    "optional": {"content": (dict, ...)},
    "plus": {"content": (dict, ...)},
    "star": {"content": (dict, ...)},
    "repeat": {"min": (int, ...), "max": (int, ...), "content": (dict, ...)},
    "tag": {"begin": (str, ...), "content": (dict, ...), "end": (object, ...)},
    "triggered_tags": {
        "triggers": (list, ...),
        "tags": (list, ...),
        "at_least_one": (bool, False),
        "stop_after_first": (bool, False),
        "excludes": (list, []),
    },
    "tags_with_separator": {
        "tags": (list, ...),
        "separator": (str, ...),
        "at_least_one": (bool, False),
        "stop_after_first": (bool, False),
    },
}
"""The formats: their fields with types and defaults; ... stands for none."""
OLDER = {"structures": (list, ...), "triggers": (list, ...)}
STRUCTURE = {"begin": (str, ...), "schema": (dict, ...), "end": (str, ...)}
TYPES = {str: "a string", dict: "an object", list: "a list", bool: "true or false", int: "a whole number"}
TIMES = {"optional": "?", "plus": "+", "star": "*"}


class StructuralTagGrammar:
    """Writes the grammar of one structural tag.

    Args:
        special: ids of special tokens by their names. Where a tag's strings have such a name, the token is
            meant; free text has none.
        part: makes the grammar of a JSON schema, a regular expression or a grammar, as the compiler takes it.
    """

    def __init__(self, special: Mapping[str, int], part: Callable[[Part, str], str]) -> None:
        self._special, self._part = special, part
        names = sorted(filter(None, special), key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)()")
        self._rules: list[str] = []
        self._parts: list[dict[str, Any]] = []

    def write(self, tag: Mapping[str, Any]) -> str:
        """The grammar, as the compiler takes it.

        Raises:
            ValueError: it is none, or has what is not supported; the message begins with the field's place.
        """
        if tag.get("type", "structural_tag") != "structural_tag":
            raise ValueError(f"type: must be 'structural_tag', not {tag['type']!r}")
        if tag.keys() & OLDER.keys():
            start = self._triggered(_from_older(_given(tag, "", OLDER)), "", (), tags="structures")
        else:
            start = self._format("format", _given(tag, "", {"format": (dict, ...)})["format"], ())
        lark = "\n".join([f"start: {start}", *self._rules])
        return json.dumps({"grammars": [{"lark_grammar": lark}, *self._parts]})

    def _format(self, where: str, found: Any, after: After) -> str:
        """A format and what comes after it."""
        kind = found.get("type") if isinstance(found, dict) else None
        if not isinstance(kind, str) or kind not in FIELDS:
            raise ValueError(f"{where}.type: {kind!r} is not supported; there are {', '.join(FIELDS)}")
        given = _given(found, where, FIELDS[kind])
        match kind:
            case "any_text":
                return self._text_to(after, _texts(given, "excludes", where), where)
            case "triggered_tags":
                return self._triggered(given, where, after)
            case "sequence" | "or":
                elements = _several(given, "elements", where)
                followed = None if kind == "sequence" else after
                written = [self._format(*element, followed) for element in elements[:-1]]
                written.append(self._format(*elements[-1], after))
                return f"({(' ' if kind == 'sequence' else ' | ').join(written)})"
        return f"{self._bounded(kind, given, where)} {self._either(after)}"

    def _bounded(self, kind: str, given: Given, where: str) -> str:
        """A format that shows by itself where it ends."""
        match kind:
            case "const_string":
                return self._literal(given["value"])
            case "json_schema" if given["style"] != "json":
                raise ValueError(f"{where}.style: {given['style']!r} is not supported; there is 'json'")
            case "json_schema":
                return self._own("json", json.dumps(given["json_schema"]))
            case "regex":
                return self._own("regex", given["pattern"])
            case "grammar":
                return self._own("grammar", given["grammar"])
            case "tag":
                return self._tag(given, where)
            case "tags_with_separator":
                return self._separated(given, where)
        inner = f"({self._format(f'{where}.content', given['content'], None)})"
        return inner + (TIMES[kind] if kind in TIMES else _times(given, where))

    def _tag(self, given: Given, where: str, *, trigger: str = "") -> str:
        """A tag, without the trigger that it begins with."""
        ends = given["end"] if isinstance(given["end"], list) else [given["end"]]
        if not ends or not all(isinstance(end, str) for end in ends):
            raise ValueError(f"{where}.end: must be a string or a list of strings")
        content = self._format(f"{where}.content", given["content"], tuple(ends))
        return f"{self._literal(given['begin'].removeprefix(trigger))} {content}"

    def _triggered(self, given: Given, where: str, after: After, *, tags: str = "tags") -> str:
        excludes = _texts(given, "excludes", where)
        rest: dict[str, list[str]] = {trigger: [] for trigger in _texts(given, "triggers", where)}
        for place, tag in _tags(given, tags, where):
            fitting = [trigger for trigger in rest if tag["begin"].startswith(trigger)]
            if len(fitting) != 1:
                text = f"begins with {len(fitting)} of the triggers; must be with one"
                raise ValueError(f"{place}.begin: {text}")
            rest[fitting[0]].append(self._tag(tag, place, trigger=fitting[0]))
        if unused := [trigger for trigger, found in rest.items() if not found]:
            raise ValueError(f"{_at(where, 'triggers')}: no tag begins with {unused[0]!r}; leave it out")
        rules = {trigger: self._rule(" | ".join(found)) for trigger, found in rest.items()}
        first = " | ".join(f"{self._literal(trigger)} {rule}" for trigger, rule in rules.items())
        if given["at_least_one"] and given["stop_after_first"]:
            return f"({first}) {self._either(after)}"
        end = self._text_to(after, excludes, where)
        marked = [f"{self._text_to((trigger,), excludes, where)} {rule}" for trigger, rule in rules.items()]
        later = self._rule(" | ".join(marked))
        if given["stop_after_first"]:
            return f"({later} {self._either(after)} | {end})"
        return f"({first}) {later}* {end}" if given["at_least_one"] else f"{later}* {end}"

    def _separated(self, given: Given, where: str) -> str:
        tag = self._rule(" | ".join(self._tag(tag, place) for place, tag in _tags(given, "tags", where)))
        more = "" if given["stop_after_first"] else f"({self._literal(given['separator'])} {tag})*"
        return f"({tag} {more})" + ("" if given["at_least_one"] else "?")

    # Pieces of the grammar

    def _text_to(self, after: After, excludes: tuple[str, ...], where: str) -> str:
        """Any text up to what comes after it, and that."""
        if after is None or "" in after:
            text = "any text must come last, or last in a tag, whose end shows where it ends"
            raise ValueError(f"{where}: {text}")
        text = ANY
        if excludes:
            text = self._rule(f"{ANY} & ~({ANY} ({_alternatives(excludes)}) {ANY})", terminal=True)
        if not after:
            return text
        found = []
        for word in after:
            begin, *special = self._names.split(word, maxsplit=1)
            if not special:
                found.append(self._rule(f"{text} {json.dumps(word)}", lazy=True))
                continue
            # a special token is no text, so that it ends the text by itself
            before = self._rule(f"{text} {json.dumps(begin)}", terminal=True) if begin else text
            found.append(f"{before} {self._literal(word[len(begin) :])}")
        return f"({' | '.join(found)})"

    def _literal(self, text: str) -> str:
        """A text as it stands, with its special tokens."""
        pieces = [piece for piece in self._names.split(text) if piece]
        written = (f"<[{self._special[p]}]>" if p in self._special else json.dumps(p) for p in pieces)
        return " ".join(written) or '""'

    def _either(self, after: After) -> str:
        return f"({' | '.join(map(self._literal, after))})" if after else ""

    def _own(self, part: Part, text: str) -> str:
        [grammar] = grammars_of(self._part(part, text))
        name = f"part_{len(self._parts)}"
        self._parts.append({**grammar, "name": name})
        return f"@{name}"

    def _rule(self, body: str, *, terminal: bool = False, lazy: bool = False) -> str:
        name = f"{'TEXT' if terminal else 'rule'}_{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name


def grammars_of(source: str) -> list[dict[str, Any]]:
    """The grammars that a compiler's source holds: the first one is where it starts."""
    return json.loads(source)["grammars"] if source.startswith("{") else [{"lark_grammar": source}]


def _alternatives(texts: Sequence[str]) -> str:
    return " | ".join(map(json.dumps, texts))


def _from_older(given: Given) -> Given:
    """The older form as `triggered_tags`."""
    structures = [_given(found, f"structures[{i}]", STRUCTURE) for i, found in enumerate(given["structures"])]
    tags = [
        {
            "type": "tag",
            "begin": found["begin"],
            "content": {"type": "json_schema", "json_schema": found["schema"]},
            "end": found["end"],
        }
        for found in structures
    ]
    plain = {"at_least_one": False, "stop_after_first": False, "excludes": []}
    return {"triggers": given["triggers"], "structures": tags, **plain}


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _given(found: Any, where: str, fields: Mapping[str, tuple[type, Any]]) -> Given:
    """An object's fields besides its `type`, with defaults for those that are not there.

    Raises:
        ValueError: one is missing, of another type or not supported.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where}: must be an object")
    for name, value in found.items():
        if name not in fields and name != "type" and value not in (None, False):
            raise ValueError(f"{_at(where, name)}: not supported; leave it out")
    given = {}
    for name, (kind, default) in fields.items():
        given[name] = value = found.get(name, default)
        if value is ...:
            raise ValueError(f"{_at(where, name)}: is missing")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{_at(where, name)}: must be {TYPES[kind]}")
    return given


def _several(given: Given, name: str, where: str) -> list[tuple[str, Any]]:
    """What a list holds, each with its place."""
    if not given[name]:
        raise ValueError(f"{_at(where, name)}: must hold at least one")
    return [(f"{_at(where, name)}[{i}]", found) for i, found in enumerate(given[name])]


def _texts(given: Given, name: str, where: str) -> tuple[str, ...]:
    for i, text in enumerate(given[name]):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{_at(where, name)}[{i}]: must be a string that is not empty")
    return tuple(given[name])


def _tags(given: Given, name: str, where: str) -> list[tuple[str, Given]]:
    found = []
    for place, tag in _several(given, name, where):
        if not isinstance(tag, dict) or tag.get("type", "tag") != "tag":
            raise ValueError(f"{place}: must be an object of type 'tag'")
        found.append((place, _given(tag, place, FIELDS["tag"])))
    return found


def _times(given: Given, where: str) -> str:
    least, most = given["min"], given["max"]
    if least < 0 or (most != -1 and most < max(least, 1)):
        raise ValueError(f"{where}.max: must be -1, for any number, or at least min, which is 0 or more")
    return f"{{{least},{'' if most == -1 else most}}}"
