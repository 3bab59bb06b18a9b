"""Calls as Llama 3.1 and 3.2 write them.

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
"""

from typing import ClassVar

from jaxllm.server.incremental import Steps
from jaxllm.server.tool_parsers.json_calls import JsonCallParser

BEGIN = "<|python_tag|>"


class Llama3JsonToolParser(JsonCallParser):
    """Reads `{"name": ..., "parameters": {...}}`, several of them parted by semicolons.

    They stand at the beginning of the answer, or after `<|python_tag|>`. Without that, an object is a call if
    there is a tool of its name and if it has parameters, and else an answer that is JSON.
    """

    needs_special_tokens: ClassVar[bool] = True

    def _read(self) -> Steps[None]:
        yield from self._skip_space()
        if self._char == "{":
            yield from self._read_calls(checked=True)
        self._release()
        while (yield from self._read_text(BEGIN)) is not None:
            yield from self._skip_space()
            yield from self._read_calls(checked=False)
            self._release()

    def _read_calls(self, *, checked: bool) -> Steps[None]:
        while (yield from self._read_call(checked=checked)):
            yield from self._skip_space()
            if self._char != ";":
                return
            yield from self._hold()
            yield from self._skip_space()
