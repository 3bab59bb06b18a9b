"""The flags that the bench commands share, and how they print what they found."""

import argparse
import json
from pathlib import Path
from typing import Any

from jaxllm.bench.figures import table

ROUNDS = 3


def at_least_one(text: str) -> int:
    """A whole number of at least 1, as argparse reads it."""
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def rate(text: str) -> float:
    """A number above 0, as argparse reads it."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


def add_report_flags(parser: argparse.ArgumentParser, *, picture: str | None = None) -> None:
    """`--json`, and `--plot` where there is a picture."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if picture:
        parser.add_argument("--plot", metavar="FILE.png", type=Path, help=f"draw {picture}")


def add_rounds_flag(parser: argparse.ArgumentParser) -> None:
    """`--rounds`."""
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=ROUNDS,
        metavar="INT",
        help=f"times that everything is measured; best and median are shown (default: {ROUNDS})",
    )


def add_length_flags(parser: argparse._ActionsContainer, **defaults: str) -> None:
    """Flags for sizes of the workload; each of `defaults` is a flag's name and what holds without it."""
    texts = {
        "num_prompts": "requests",
        "input_len": "tokens of each prompt",
        "output_len": "tokens generated for each request",
        "long_len": "tokens of the prompt whose prefill is timed",
        "shared_len": "tokens that all prompts begin with",
    }
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=at_least_one,
            metavar="INT",
            help=f"{texts[name]} (default: {default})",
        )


def lengths(arguments: argparse.Namespace, *names: str) -> dict[str, int]:
    """Those of the sizes that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def print_report(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Prints the figures, for programs or for people."""
    print(json.dumps(report) if arguments.json else table(report))
