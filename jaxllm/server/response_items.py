"""The items of an answer of `/v1/responses`, and the events of one that is streamed.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.server.answer_blocks import Block, BlockEvent
from jaxllm.server.logprobs import TokenLogprob
from jaxllm.server.response_types import OutputItem, OutputPart, OutputReasoningText, OutputText

PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
PART_TYPES = {"text": "output_text", "reasoning": "reasoning_text"}


class ItemEvents:
    """Writes blocks as items, and what happens to them as events.

    Args:
        answer_id: the items' ids are made from it.
    """

    def __init__(self, answer_id: str) -> None:
        self._answer_id = answer_id
        self._logprobs: dict[int, list[TokenLogprob]] = {}

    def item(self, block: Block) -> OutputItem:
        """A block as an item of the answer."""
        id, status = self._id(block), block.status
        if block.kind == "text":
            content = [self._text(block)]
            return {"id": id, "status": status, "type": "message", "role": "assistant", "content": content}
        if block.kind == "reasoning":
            thoughts = [_reasoning(block)]
            return {"id": id, "status": status, "type": "reasoning", "summary": [], "content": thoughts}
        return {
            "id": id,
            "status": status,
            "type": "function_call",
            "call_id": block.call_id,
            "name": block.name,
            "arguments": block.text,
        }

    def of(self, happened: BlockEvent, logprobs: Sequence[TokenLogprob]) -> Iterator[dict[str, Any]]:
        """What happened to a block, as events.

        Args:
            logprobs: of the text that is new.
        """
        what, block, text = happened
        if what == "begin":
            yield from self._begin(block)
        elif what == "end":
            yield from self._end(block)
        elif block.kind == "call":
            place = self._place(block)
            yield {"type": "response.function_call_arguments.delta", **place, "delta": text}
        elif block.kind == "reasoning":
            place = self._place(block) | {"content_index": 0}
            yield {"type": "response.reasoning_text.delta", **place, "delta": text}
        else:
            self._logprobs.setdefault(block.index, []).extend(logprobs)
            place = self._place(block) | {"content_index": 0}
            event = {"type": "response.output_text.delta", **place, "delta": text}
            yield {**event, "logprobs": list(logprobs)}

    def _begin(self, block: Block) -> Iterator[dict[str, Any]]:
        item: dict[str, Any] = {**self.item(block)}
        if block.kind != "call":
            item["content"] = []
        yield {"type": "response.output_item.added", "output_index": block.index, "item": item}
        if block.kind != "call":
            place = self._place(block) | {"content_index": 0}
            yield {"type": "response.content_part.added", **place, "part": self._part(block)}

    def _end(self, block: Block) -> Iterator[dict[str, Any]]:
        place = self._place(block)
        if block.kind == "call":
            done = {"name": block.name, "arguments": block.text}
            yield {"type": "response.function_call_arguments.done", **place, **done}
        else:
            place["content_index"] = 0
            done: dict[str, Any] = {"text": block.text}
            if block.kind == "text":
                done["logprobs"] = self._logprobs.get(block.index, [])
            yield {"type": f"response.{PART_TYPES[block.kind]}.done", **place, **done}
            yield {"type": "response.content_part.done", **place, "part": self._part(block)}
        yield {"type": "response.output_item.done", "output_index": block.index, "item": self.item(block)}

    def _id(self, block: Block) -> str:
        return f"{PREFIXES[block.kind]}_{self._answer_id}" + (f"_{block.index}" if block.index else "")

    def _place(self, block: Block) -> dict[str, Any]:
        return {"item_id": self._id(block), "output_index": block.index}

    def _part(self, block: Block) -> OutputPart:
        return self._text(block) if block.kind == "text" else _reasoning(block)

    def _text(self, block: Block) -> OutputText:
        logprobs = self._logprobs.get(block.index, [])
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}


def _reasoning(block: Block) -> OutputReasoningText:
    return {"type": "reasoning_text", "text": block.text}
