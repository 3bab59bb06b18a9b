"""Reasoning as DeepSeek R1 and its distilled models write it, and QwQ.

Source: https://huggingface.co/deepseek-ai/DeepSeek-R1 ("Usage Recommendations")
"""

from typing import ClassVar

from jaxllm.server.reasoning_parsers.base import Beginning, ThinkParser


class DeepSeekR1ReasoningParser(ThinkParser):
    """Reads reasoning up to `</think>`. The answer always begins with it, with `<think>` or without."""

    default: ClassVar[Beginning] = "reasoning"
