"""The `jaxllm` program: finds the command, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted. Results go to stdout, all else to stderr.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": "complete prompts, or answer them as a chat",
    "chat": "talk with a model in the terminal",
    "convert": "write a checkpoint that restores quickly and sharded",
    "env": "show versions, devices, caches and kernels, for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(argv[0] if argv else None)
    arguments = parser.parse_args(argv)
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
        print(f"jaxllm {arguments.command}: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole program, with the flags of `command` alone, whose module alone is imported."""
    parser = argparse.ArgumentParser("jaxllm", description="LLM inference on JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("jaxllm"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False
        )
        if name == command:
            module = importlib.import_module(f"jaxllm.cli.{name}")
            module.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
            sub.set_defaults(run=module.run, usage_error=sub.error)
    return parser
