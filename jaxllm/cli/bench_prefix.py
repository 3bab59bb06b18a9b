"""`jaxllm bench prefix`: prompts that begin the same."""

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
    group = parser.add_argument_group("workload", "Random token ids: common ones, then 16 to 32 of its own.")
    add_length_flags(group, num_prompts="32", shared_len="1024", output_len="128")
    add_rounds_flag(parser)
    add_report_flags(parser, picture="times and rates with and without hits")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    options = engine_options(arguments)

    from jaxllm.bench import prefix
    from jaxllm.bench.picture import check_plots, draw_prefix
    from jaxllm.bench.session import Session

    check_plots(arguments.plot)
    with Session(arguments.model, **options) as session:
        sizes = lengths(arguments, "num_prompts", "shared_len", "output_len")
        figures = prefix.measure(session, rounds=arguments.rounds, **sizes)
        report = {"benchmark": "prefix", "engine": session.about(), **figures}
    print_report(arguments, report)
    if arguments.plot:
        draw_prefix(report, arguments.plot)
    return 0
