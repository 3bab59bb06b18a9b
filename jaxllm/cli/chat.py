"""`jaxllm chat`: a conversation in the terminal, streamed."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jaxllm.cli.figures import Figures
from jaxllm.cli.options import (
    add_engine_flags,
    add_sampling_flags,
    engine_options,
    request_params,
    sampling_options,
)
from jaxllm.sampling.params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine

HINT = "/reset starts over, /exit or ctrl-D leaves, ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--json", action="store_true", help="print each answer as a JSON object, when it is done"
    )
    parser.add_argument("--figures", action="store_true", help="show how fast each answer was")
    add_sampling_flags(parser, without={"n", "logprobs", "prompt_logprobs"})


def run(arguments: argparse.Namespace) -> int:
    """Answers each line of stdin until it ends."""
    options = engine_options(arguments)
    options.setdefault("max_num_seqs", 1)  # fewer programs to compile than for a batch
    sampling = sampling_options(arguments, {"max_tokens": None}) | {"output_kind": RequestOutputKind.DELTA}
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - its import gives input() line editing and history

    from jaxllm import Engine

    with Engine.from_pretrained(arguments.model, **options) as engine:
        params = request_params(engine, sampling)
        conversation = Conversation(engine, params, arguments.system)
        _say(f"{arguments.model}: {HINT}")
        for line in _lines(interactive):
            if line == "/exit":
                break
            if line == "/reset":
                conversation.reset()
                _say("a new conversation")
            elif line.startswith("/"):
                _say(f"{line.split()[0]} is no command; {HINT}")
            elif line:
                _answer(conversation, line, arguments, interactive)
    return 0


class Conversation:
    """The messages so far, and the engine that answers them."""

    def __init__(self, engine: "Engine", params: SamplingParams, system: str | None) -> None:
        self.engine, self.params, self.system = engine, params, system
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(
        self, text: str, figures: Figures, *, show: Callable[[str], object], stopped: Callable[[], bool]
    ) -> dict[str, str]:
        """Streams the answer to a message through `show`, and returns it as a message with its finish reason.

        What was answered before `stopped()` stays in the conversation, so that one can go on from there.

        Raises:
            ValueError: the engine refuses the message, for example because the conversation has become too
                long for the model; it stays as it was before.
        """
        messages: list[Any] = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        reason = "stopped"
        with contextlib.closing(self.engine.stream_chat(messages, self.params)) as outputs:
            for output in outputs:
                figures.note(output)
                for completion in output.outputs:
                    show(completion.text)
                    pieces.append(completion.text)
                    reason = completion.finish_reason or reason
                if stopped():
                    break
        answer = {"role": "assistant", "content": "".join(pieces)}
        self.messages = [*messages, answer]
        return {**answer, "finish_reason": reason}


@contextlib.contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """While inside, a first ctrl-C is only remembered, so that it tears no step; a second one is raised."""
    seen = False

    def remember(number: int, frame: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(conversation: Conversation, line: str, arguments: argparse.Namespace, interactive: bool) -> None:
    figures = Figures(conversation.engine)
    try:
        with held_interrupt() if interactive else contextlib.nullcontext(lambda: False) as stopped:
            show = (lambda text: None) if arguments.json else _show
            answer = conversation.answer(line, figures, show=show, stopped=stopped)
    except ValueError as error:
        if not interactive:
            raise
        _say(str(error))
        return
    print(json.dumps(answer) if arguments.json else "", flush=True)
    if arguments.figures:
        figures.print()


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, without the blanks around it; at the prompt ctrl-C only drops the line."""
    while True:
        try:
            yield input("> " if interactive else "").strip()
        except KeyboardInterrupt:
            if not interactive:
                raise
            _say(f"\n{HINT}")
        except EOFError:
            return


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
