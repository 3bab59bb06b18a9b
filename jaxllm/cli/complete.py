"""`jaxllm complete`: completes a prompt with a model that a server has."""

import argparse
import sys

from jaxllm.cli.constraint import for_server
from jaxllm.cli.options import add_sampling_flags, sampling_options
from jaxllm.cli.remote import NOT_ASKED, Remote, add_server_flags, server_headers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="what to complete (default: all of stdin)"
    )
    add_server_flags(parser, url_default="http://127.0.0.1:8000")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    add_sampling_flags(parser, without={"n", "logprobs", "prompt_logprobs", *NOT_ASKED}, with_seed=True)


def run(arguments: argparse.Namespace) -> int:
    """Streams the text."""
    sampling = sampling_options(arguments, {})
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if arguments.echo:
        print(prompt, end="")
    with Remote(arguments.url, arguments.model_name, server_headers(arguments)) as server:
        for chunk in server.stream("/v1/completions", {"prompt": prompt, **for_server(sampling)}):
            for choice in chunk["choices"]:
                print(choice["text"], end="", flush=True)
    print()
    return 0
