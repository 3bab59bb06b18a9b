"""`jaxllm chat`: a conversation in the terminal, streamed."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.cli.flags import flag_name
from jaxllm.cli.options import (
    add_engine_flags,
    add_sampling_flags,
    engine_options,
    engine_options_given,
    request_params,
    sampling_options,
)
from jaxllm.cli.remote import NOT_ASKED, Remote, add_server_flags, server_headers
from jaxllm.cli.speakers import EngineSpeaker, ServerSpeaker, Speaker
from jaxllm.sampling.params import RequestOutputKind

HINT = "/reset starts over, /exit or ctrl-D leaves, ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser, model_may_lack=True)
    add_server_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--json", action="store_true", help="print each answer as a JSON object, when it is done"
    )
    parser.add_argument("--figures", action="store_true", help="show how fast each answer was")
    add_sampling_flags(parser, without={"n", "logprobs", "prompt_logprobs"})


def run(arguments: argparse.Namespace) -> int:
    """Answers each line of stdin until it ends."""
    if (arguments.model is None) == (arguments.url is None):
        arguments.usage_error("give MODEL to load it here, or --url to talk to a server")
    with _speaker_here(arguments) if arguments.url is None else _speaker_there(arguments) as speaker:
        _talk(Conversation(speaker, arguments.system), arguments)
    return 0


@contextlib.contextmanager
def _speaker_here(arguments: argparse.Namespace) -> Iterator[Speaker]:
    options = engine_options(arguments)
    options.setdefault("max_num_seqs", 1)  # fewer programs to compile than for a batch
    sampling = sampling_options(arguments, {"max_tokens": None}) | {"output_kind": RequestOutputKind.DELTA}

    from jaxllm import Engine

    with Engine.from_pretrained(arguments.model, **options) as engine:
        _say(f"{arguments.model}: {HINT}")
        yield EngineSpeaker(engine, request_params(engine, sampling))


@contextlib.contextmanager
def _speaker_there(arguments: argparse.Namespace) -> Iterator[Speaker]:
    sampling = sampling_options(arguments, {})
    asked = [flag_name(name) for name in NOT_ASKED if name in sampling]
    if engine_options_given(arguments) or asked or arguments.figures:
        names = [*engine_options_given(arguments), *asked, *(["--figures"] if arguments.figures else [])]
        arguments.usage_error(f"with --url the engine is the server's: leave out {', '.join(names)}")
    with Remote(arguments.url, arguments.model_name, server_headers(arguments)) as server:
        _say(f"{server.model}: {HINT}")
        yield ServerSpeaker(server, sampling)


def _talk(conversation: "Conversation", arguments: argparse.Namespace) -> None:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - its import gives input() line editing and history
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


class Conversation:
    """The messages so far, and who answers them."""

    def __init__(self, speaker: Speaker, system: str | None) -> None:
        self.speaker, self.system = speaker, system
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(
        self, text: str, *, show: Callable[[str], object], stopped: Callable[[], bool]
    ) -> dict[str, str]:
        """Streams the answer to a message through `show`, and returns it as a message with its finish reason.

        What was answered before `stopped()` stays in the conversation, so that one can go on from there.

        Raises:
            ValueError: the message is refused, for example because the conversation has become too
                long for the model; it stays as it was before.
        """
        messages: list[Any] = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        reason = "stopped"
        with contextlib.closing(self.speaker.answer(messages)) as found:
            for piece, finish_reason in found:
                show(piece)
                pieces.append(piece)
                reason = finish_reason or reason
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
    try:
        with held_interrupt() if interactive else contextlib.nullcontext(lambda: False) as stopped:
            show = (lambda text: None) if arguments.json else _show
            answer = conversation.answer(line, show=show, stopped=stopped)
    except ValueError as error:
        if not interactive:
            raise
        _say(str(error))
        return
    print(json.dumps(answer) if arguments.json else "", flush=True)
    if arguments.figures:
        conversation.speaker.print_figures()


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
