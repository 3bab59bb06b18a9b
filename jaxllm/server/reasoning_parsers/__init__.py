"""Parsers that part what models think from what they answer.

parser = Qwen3ReasoningParser()
parts = [*parser.feed("<think>It is a greeting.</think>Hello!"), *parser.finish()]
"""

from jaxllm.server.reasoning_parsers.base import ReasoningParser, ThinkParser, count_reasoning
from jaxllm.server.reasoning_parsers.deepseek_r1 import DeepSeekR1ReasoningParser
from jaxllm.server.reasoning_parsers.qwen3 import Qwen3ReasoningParser
from jaxllm.server.registry import Registry

__all__ = [
    "REASONING_PARSERS",
    "DeepSeekR1ReasoningParser",
    "Qwen3ReasoningParser",
    "ReasoningParser",
    "ThinkParser",
    "count_reasoning",
    "register_reasoning_parser",
]

REASONING_PARSERS: Registry[type[ReasoningParser]] = Registry(
    "reasoning_parser", {"deepseek_r1": DeepSeekR1ReasoningParser, "qwen3": Qwen3ReasoningParser}
)
"""What `--reasoning-parser` can be."""


def register_reasoning_parser(name: str, parser: type[ReasoningParser]) -> None:
    """Makes a parser known as `--reasoning-parser NAME`.

    Raises:
        ValueError: the name is empty or taken.
        TypeError: it is no class.
    """
    REASONING_PARSERS.register(name, parser)
