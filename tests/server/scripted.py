"""A server whose model writes what a test wants: a tiny random one, held to a text, token by token."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from running import Running, running
from small_text import text_checkpoint

from jaxllm.server.answer_form import AnswerForm
from jaxllm.server.config import AnswerConfig
from jaxllm.structured import StructuredOutputsParams

TEMPLATE = (
    "<s>{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<|user|>{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{{ call.id }}{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    "{% if add_generation_prompt %}>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
AUTO = AnswerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes")
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
TIME_CALL = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


def function(name: str = "weather", **more: Any) -> dict[str, Any]:
    """A tool as chats have it."""
    return {"type": "function", "function": {"name": name, "parameters": CITY} | more}


TOOLS = [function(), function("time", parameters=None)]


@contextlib.contextmanager
def tool_server(folder: Path) -> Iterator[Running]:
    """A server with room for calls, a template that shows tools, and calls as the model likes."""
    model = text_checkpoint(folder)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 600}
    (model / "config.json").write_text(json.dumps(config))
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "chat_template": TEMPLATE}
    with running(model, served_model_name=("tiny",), **flags) as found:
        yield found


@contextlib.contextmanager
def writes(*texts: str) -> Iterator[None]:
    """Has the model write these, one a request and the last again and again, unless it must call."""
    shape, rest = AnswerForm.shape, [*texts]

    def held(form: AnswerForm, prompt: Any, params: Any) -> Any:
        params = shape(form, prompt, params)
        if form.use.mode not in ("required", "named"):
            text = rest.pop(0) if len(rest) > 1 else rest[0]
            params = replace(params, structured_outputs=StructuredOutputsParams(choice=[text]))
        return replace(params, max_tokens=params.max_tokens or 300)

    with patch.object(AnswerForm, "shape", held):
        yield


@contextlib.contextmanager
def configured(server: Running, **answer: Any) -> Iterator[None]:
    """Has the server read answers otherwise."""
    service = server.service
    with patch.object(service, "config", replace(service.config, answer=AnswerConfig(**answer))):
        yield
