"""Reasoning as Qwen 3 writes it.

Source: https://huggingface.co/Qwen/Qwen3-8B ("Switching Between Thinking and Non-Thinking Mode")
"""

from typing import ClassVar

from jaxllm.server.reasoning_parsers.base import Beginning, ThinkParser


class Qwen3ReasoningParser(ThinkParser):
    """Reads reasoning between `<think>` and `</think>`, if the answer begins with it.

    With `enable_thinking=False` the template writes an empty one into the prompt, and there is none then.
    """

    default: ClassVar[Beginning] = "either"
