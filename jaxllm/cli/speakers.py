"""Who answers in `jaxllm chat`: an engine in this process, or a server."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

from jaxllm.cli.constraint import for_server
from jaxllm.cli.figures import Figures
from jaxllm.cli.remote import Remote
from jaxllm.sampling.params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine

Messages = Sequence[Mapping[str, Any]]
Piece = tuple[str, str | None]
"""Some text, and the finish reason if the answer ends with it."""


class Speaker(Protocol):
    """Answers conversations."""

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """The answer as it grows. Closing the generator ends the request.

        Raises:
            ValueError: the conversation is refused, for example because it is too long for the model.
        """
        ...

    def print_figures(self) -> None:
        """Prints how fast the last answer was."""
        ...


class EngineSpeaker:
    """An engine in this process."""

    def __init__(self, engine: "Engine", params: SamplingParams) -> None:
        self.engine, self._params = engine, params
        self._figures = Figures(engine)

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """See `Speaker`."""
        self._figures = Figures(self.engine)
        with closing(self.engine.stream_chat(messages, self._params)) as outputs:
            for output in outputs:
                self._figures.note(output)
                for completion in output.outputs:
                    yield completion.text, completion.finish_reason

    def print_figures(self) -> None:
        """See `Speaker`."""
        self._figures.print()


class ServerSpeaker:
    """A server, asked with the fields of `sampling`."""

    def __init__(self, server: Remote, sampling: Mapping[str, Any]) -> None:
        self._server, self._sampling = server, sampling

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """See `Speaker`."""
        body = {"messages": list(messages), **for_server(self._sampling)}
        with closing(self._server.stream("/v1/chat/completions", body)) as chunks:
            for chunk in chunks:
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or "", choice["finish_reason"]

    def print_figures(self) -> None:
        """Nothing: the engine's figures are the server's."""
