"""The `jaxllm` program: finds the command, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted. Results go to stdout, all else to stderr.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence

from jaxllm.cli.parser import Parser

COMMANDS = {
    "generate": "complete prompts, or answer them as a chat",
    "chat": "talk with a model in the terminal",
    "serve": "serve a model over HTTP, to OpenAI's clients",
    "complete": "complete a prompt with a server's model",
    "run-batch": "answer a file of requests in OpenAI's batch format",
    "convert": "write a checkpoint that restores quickly and sharded",
    "plan": "say what a model would take and give on chips that need not be there",
    "bench": "measure speed, and how it grows",
    "env": "show versions, devices, caches and kernels, for a bug report",
}
BENCH_COMMANDS = {
    "bench throughput": "measure tokens a second with many requests",
    "bench latency": "measure one request alone: first token, decoding, prefill",
    "bench prefix": "compare prompts found in the prefix cache with prompts that are not",
    "bench startup": "measure the time from starting a process to its first token",
    "bench growth": "measure how a step's time grows with rows, tokens, context and the like",
    "bench serve": "measure a server under load, as its clients see it",
    "bench scheduler": "measure what planning a step costs; needs no model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        program_parser("jaxllm", COMMANDS).parse_args(argv)  # prints the help or the version, or complains
    command = argv.pop(0)
    if command == "bench":
        if not argv or f"bench {argv[0]}" not in BENCH_COMMANDS:
            benches = {name.removeprefix("bench "): text for name, text in BENCH_COMMANDS.items()}
            program_parser("jaxllm bench", benches).parse_args(argv)
        command = f"bench {argv.pop(0)}"
    parser = command_parser(command)
    arguments = parser.parse_intermixed_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left, as `head` does. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        message = parser.explain(error, arguments) if isinstance(error, OSError) else str(error)
        print(f"jaxllm {command}: {message or type(error).__name__}", file=sys.stderr)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            # At its end jax would wait for other hosts, which do not come any more.
            sys.stderr.flush()
            os._exit(1)
        return 1


_AS_MODULE = str.maketrans(" -", "__")


def program_parser(program: str, commands_of: Mapping[str, str]) -> Parser:
    """A parser that ends the program: it knows the commands by name and imports none of them."""
    width = max(map(len, commands_of))
    parser = Parser(
        program,
        description="LLM inference on JAX.",
        epilog="commands:\n" + "\n".join(f"    {name:{width}}  {text}" for name, text in commands_of.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("jaxllm"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True, help="one of those below")
    for name in commands_of:
        commands.add_parser(name)
    return parser


def command_parser(command: str) -> Parser:
    """The parser of one command. It allows flags between prompts, which argparse's subcommands do not."""
    module = importlib.import_module(f"jaxllm.cli.{command.translate(_AS_MODULE)}")
    summary = (COMMANDS | BENCH_COMMANDS)[command]
    summary = summary[0].upper() + summary[1:] + "."
    parser = Parser(f"jaxllm {command}", description=summary, allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.set_defaults(run=module.run, parser=parser, usage_error=parser.error)
    return parser
