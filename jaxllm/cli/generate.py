"""`jaxllm generate`: completes prompts, or answers them as a chat."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from jaxllm.cli.figures import Figures
from jaxllm.cli.following import follow_if_told
from jaxllm.cli.options import (
    add_engine_flags,
    add_sampling_flags,
    engine_options,
    request_params,
    sampling_options,
)
from jaxllm.sampling.params import RequestOutputKind

if TYPE_CHECKING:
    from jaxllm.engine.outputs import RequestOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser)
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", default=[], help="what to complete (default: all of stdin)"
    )
    parser.add_argument("--chat", action="store_true", help="answer each prompt as a message, at any length")
    parser.add_argument("--system", metavar="TEXT", help="the system message, with --chat")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each prompt, when it is done"
    )
    add_sampling_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Streams the text if there is only one, else prints each when all are done."""
    options = engine_options(arguments, several_hosts=True)
    sampling = sampling_options(arguments, {"max_tokens": None} if arguments.chat else {})
    _check(arguments, sampling)
    prompts = arguments.prompts or [sys.stdin.read()]
    if len(prompts) == sampling.get("n", 1) == 1:
        options.setdefault("max_num_seqs", 1)  # fewer programs to compile than for a batch

    if follow_if_told(arguments.model, options):
        return 0

    from jaxllm import Engine

    with Engine.from_pretrained(arguments.model, **options) as engine:
        params = request_params(engine, sampling)
        requests: list[Any] = prompts
        stream, complete = engine.stream, engine.generate
        if arguments.chat:
            requests = [_messages(prompt, arguments.system) for prompt in prompts]
            stream, complete = engine.stream_chat, engine.chat
        figures = Figures(engine)
        if len(requests) == 1 and params.n == 1 and not arguments.json:
            delta = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
            for output in stream(requests[0], delta):
                figures.note(output)
                for completion in output.outputs:
                    print(completion.text, end="", flush=True)
            print()
        else:
            outputs = complete(requests, params, progress=engine.config.compile.progress)
            for prompt, output in zip(prompts, outputs, strict=True):
                figures.note(output)
                print(json.dumps(_as_json(output)) if arguments.json else _as_text(prompt, output))
        figures.print()
    return 0


def _check(arguments: argparse.Namespace, sampling: dict[str, Any]) -> None:
    if arguments.system is not None and not arguments.chat:
        arguments.usage_error("--system is for chats: add --chat")
    for name in ("logprobs", "prompt_logprobs"):
        if sampling.get(name) is not None and not arguments.json:
            arguments.usage_error(f"--{name.replace('_', '-')} is shown in JSON only: add --json")


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _as_text(prompt: str, output: "RequestOutput") -> str:
    """Each text below a line that says what it answers, as `head` does for several files."""
    count = len(output.outputs)
    titles = [f" ({i + 1} of {count})" if count > 1 else "" for i in range(count)]
    name = " ".join(prompt.split())
    return "\n".join(
        f"==> {name}{title} <==\n{completion.text}\n"
        for title, completion in zip(titles, output.outputs, strict=True)
    )


def _as_json(output: "RequestOutput") -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(output, metrics=None))
    if output.metrics is not None:
        names = ("time_to_first_token", "end_to_end_time", "num_preemptions")
        fields["metrics"] = {name: getattr(output.metrics, name) for name in names}
    return fields
