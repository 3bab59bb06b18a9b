"""Parsers of the calls of tools that models write, each for a form that models were trained on.

    parser = HermesToolParser(["get_weather"])
    parts = [*parser.feed('<tool_call>{"name": "get_weather", "arguments": {}}'), *parser.finish()]

They need no server and no model: text goes in, parts of the answer come out.
"""

from jaxllm.server.registry import Registry
from jaxllm.server.tool_parsers.base import CallParser, ToolParser
from jaxllm.server.tool_parsers.forced import NamedCallParser, RequiredCallsParser
from jaxllm.server.tool_parsers.hermes import HermesToolParser
from jaxllm.server.tool_parsers.json_calls import JsonCallParser
from jaxllm.server.tool_parsers.llama3_json import Llama3JsonToolParser
from jaxllm.server.tool_parsers.mistral import MistralToolParser
from jaxllm.server.tool_parsers.pythonic import PythonicToolParser

__all__ = [
    "TOOL_PARSERS",
    "CallParser",
    "HermesToolParser",
    "JsonCallParser",
    "Llama3JsonToolParser",
    "MistralToolParser",
    "NamedCallParser",
    "PythonicToolParser",
    "RequiredCallsParser",
    "ToolParser",
    "register_tool_parser",
]

TOOL_PARSERS: Registry[type[ToolParser]] = Registry(
    "tool_call_parser",
    {
        "hermes": HermesToolParser,
        "llama3_json": Llama3JsonToolParser,
        "mistral": MistralToolParser,
        "pythonic": PythonicToolParser,
    },
)
"""What `--tool-call-parser` can be."""


def register_tool_parser(name: str, parser: type[ToolParser]) -> None:
    """Makes a parser known as `--tool-call-parser NAME`.

    Raises:
        ValueError: the name is empty or taken.
        TypeError: it is no class.
    """
    TOOL_PARSERS.register(name, parser)
