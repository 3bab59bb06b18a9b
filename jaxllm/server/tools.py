"""Tools that a request brings, and which of them an answer may or must call."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from jaxllm.server.fields import ApiModel

Mode = Literal["none", "auto", "required", "named"]
"""No calls; calls as the model likes; at least one; one of a certain tool."""

NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
MODES = ("none", "auto", "required")


def _check_schema(schema: Any) -> Any:
    """What shows at once in a JSON schema of arguments; grammars check the rest when they are made.

    Raises:
        ValueError: it does not describe an object.
    """
    if schema is None:
        return schema
    if schema.get("type", "object") != "object":
        raise ValueError("must be a JSON schema with type 'object'")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(v, dict | bool) for v in properties.values()):
        raise ValueError("'properties' must be an object of JSON schemas")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError("'required' must be a list of names")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_check_schema)]
"""A JSON schema of a tool's arguments."""
ToolName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class FunctionDefinition(ApiModel):
    """A function that may be called, as `/v1/chat/completions` has it."""

    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ChatTool(ApiModel):
    """A tool, as `/v1/chat/completions` has it: functions only."""

    type: Literal["function"]
    function: FunctionDefinition

    def tool(self) -> "Tool":
        """The tool, whatever the interface."""
        given = self.function
        return Tool(given.name, given.description, given.parameters, bool(given.strict))


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        parameters: the JSON schema of its arguments; None if it takes none.
        strict: whether arguments must follow it also when the model calls of its own accord.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}

    def shown(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.schema}}


@dataclass(frozen=True)
class ToolUse:
    """What an answer may do with tools.

    Attributes:
        tools: all that the model is shown.
        mode: whether it calls any.
        allowed: those that it may call.
        parallel: whether it may make several calls in an answer.
    """

    tools: tuple[Tool, ...] = ()
    mode: Mode = "none"
    allowed: tuple[Tool, ...] = field(default=())
    parallel: bool = True

    @classmethod
    def make(
        cls,
        tools: Sequence[Tool],
        mode: Mode | None,
        *,
        names: Collection[str] | None = None,
        parallel: bool | None = None,
    ) -> "ToolUse":
        """Checks what a request asks for.

        Args:
            mode: None: "auto" if there are tools, else "none".
            names: of the tools that may be called; None: all.
            parallel: None: True.

        Raises:
            ValueError: a name twice, calls without tools, or a tool that is not there; the message begins
                with the parameter.
        """
        known = {tool.name: tool for tool in tools}
        if len(known) < len(tools):
            seen = [tool.name for tool in tools]
            [twice, *_] = [name for name in known if seen.count(name) > 1]
            raise ValueError(f"tools: there are two of the name {twice!r}; names must differ")
        if not tools and (names is not None or mode in ("required", "named")):
            raise ValueError("tool_choice: there are no tools that could be called; give some in tools")
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise ValueError(f"tool_choice: there is no tool {unknown[0]!r} among {', '.join(known)}")
        allowed = tuple(tools) if names is None else tuple(known[name] for name in dict.fromkeys(names))
        mode = mode or ("auto" if tools else "none")
        return cls(tuple(tools), mode if tools else "none", allowed, parallel is not False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools that may be called."""
        return tuple(tool.name for tool in self.allowed)


def check_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Looks whether every result in a conversation belongs to a call before it.

    Raises:
        ValueError: one does not.
    """
    calls: set[str] = set()
    for i, message in enumerate(messages):
        calls.update(str(call.get("id")) for call in message.get("tool_calls") or ())
        if message.get("role") == "tool" and message.get("tool_call_id") not in calls:
            id = message.get("tool_call_id")
            raise ValueError(f"messages[{i}].tool_call_id: no call before it has the id {id!r}")


def read_choice(choice: Any, *name_at: str) -> tuple[Mode | None, Any]:
    """OpenAI's `tool_choice`: its mode, and the names that it holds.

    Args:
        name_at: under which keys the name stands in a tool's mention; the interfaces write it differently.

    Raises:
        ValueError: it is none; the message begins with the parameter.
    """
    if choice is None or choice in MODES:
        return choice, None
    kind = _at(choice, "type")
    if kind == "function":
        name = _at(choice, *name_at)
        if not isinstance(name, str):
            raise ValueError("tool_choice: needs the function's name")
        return "named", (name,)
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        mode, mentions = _at(allowed, "mode"), _at(allowed, "tools")
        if mode not in ("auto", "required") or not isinstance(mentions, list) or not mentions:
            raise ValueError("tool_choice: allowed_tools needs a mode, 'auto' or 'required', and tools")
        names = [_at(mention, *name_at) for mention in mentions]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("tool_choice: allowed_tools needs the functions' names")
        return mode, tuple(names)
    raise ValueError(f"tool_choice: must be one of {', '.join(MODES)}, or name a function or allowed_tools")


def _at(found: Any, *keys: str) -> Any:
    """What stands under keys, one in the other; None if it is not there, whatever stands there instead."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
