"""What `/v1/chat/completions` is asked with: https://platform.openai.com/docs/api-reference/chat/create"""

from functools import cached_property
from typing import Any, ClassVar, Self

from pydantic import model_validator

from jaxllm.server.fields import OF_CONVERSATIONS, REFUSED, GenerationRequest, Refusals
from jaxllm.server.tools import ChatTool, ToolUse, read_choice

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatCompletionRequest(GenerationRequest):
    """A conversation that is to be gone on with, and how."""

    refused: ClassVar[Refusals] = {
        **REFUSED,
        **OF_CONVERSATIONS,
        "functions": ((), "use tools"),
        "function_call": (("none", "auto"), "use tools and tool_choice"),
        "reasoning_effort": (("none",), "set what the model's template reads with chat_template_kwargs"),
        "verbosity": (("medium",), "ask for it in the prompt"),
        "modalities": ((["text"],), "models here write text only"),
        "audio": ((), "models here write text only"),
        "prediction": ((), "every token is sampled by the model itself"),
        "store": ((), "answers are not kept"),
        "metadata": ((), "answers are not kept, and so neither is what describes them"),
        "service_tier": (("auto", "default"), "all requests are served alike; order them with priority"),
        "web_search_options": ((), "there is no search"),
        "prompt_cache_key": (
            (),
            "prompts that begin alike share a cache; keep them apart with cache_salt",
        ),
        "echo": ((), "use continue_final_message, and put the text before the answer yourself"),
    }

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    safety_identifier: str | None = None
    """Shown in the server's log, as `user` is."""

    tools: list[ChatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: it is the older name of max_completion_tokens; give one of them")
        for i, message in enumerate(self.messages):
            if message.get("role") not in ROLES:
                raise ValueError(f"messages[{i}].role: must be one of {', '.join(ROLES)}")
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise ValueError(f"messages[{i}].tool_calls: must be a list of calls")
        _ = self.tool_use
        return self

    @cached_property
    def tool_use(self) -> ToolUse:
        """What the answer may do with tools.

        Raises:
            ValueError: tools or a choice that make no sense.
        """
        mode, names = read_choice(self.tool_choice, "function", "name")
        tools = [tool.tool() for tool in self.tools or ()]
        return ToolUse.make(tools, mode, names=names, parallel=self.parallel_tool_calls)
