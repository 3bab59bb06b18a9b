"""Calls that the model is held to by a grammar: their form is known, whatever the model."""

from jaxllm.server.incremental import Steps
from jaxllm.server.tool_parsers.base import CallParser
from jaxllm.server.tool_parsers.json_calls import JsonCallParser


class NamedCallParser(CallParser):
    """Reads a text that is one tool's arguments, and nothing else."""

    def _read(self) -> Steps[None]:
        yield from self._skip_space()
        if not self._char:
            return
        [name] = self._tools
        self._begin(name)
        while self._char:
            self._argue(self._char)
            yield


class RequiredCallsParser(JsonCallParser):
    """Reads a text that is a list of calls: `[{"name": ..., "arguments": {...}}, ...]`."""

    def _read(self) -> Steps[None]:
        yield from self._skip_space()
        yield from self._read_list()
        self._release()
        yield from self._read_text()
