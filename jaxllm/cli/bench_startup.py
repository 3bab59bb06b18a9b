"""`jaxllm bench startup`: from the start of a process to its first token."""

import argparse

from jaxllm.cli.bench_options import (
    add_length_flags,
    add_report_flags,
    add_rounds_flag,
    lengths,
    print_report,
)
from jaxllm.cli.options import add_engine_flags, engine_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser)
    add_length_flags(parser, input_len="128")
    add_rounds_flag(parser)
    add_report_flags(parser, picture="the phases of the cold and of the best warm start")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    options = engine_options(arguments)

    from jaxllm.bench import startup
    from jaxllm.bench.picture import check_plots, draw_startup

    check_plots(arguments.plot)
    sizes = lengths(arguments, "input_len")
    prompt_len = {"prompt_len": sizes["input_len"]} if sizes else {}
    figures = startup.measure(arguments.model, options, rounds=arguments.rounds, **prompt_len)
    report = {"benchmark": "startup", **figures}
    print_report(arguments, report)
    if arguments.plot:
        draw_startup(report, arguments.plot)
    return 0
