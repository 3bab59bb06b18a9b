"""`jaxllm bench latency`: one request alone."""

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
    group = parser.add_argument_group(
        "workload", "Random token ids, greedy, each request to its full length."
    )
    add_length_flags(group, input_len="128", output_len="128", long_len="1024")
    add_rounds_flag(parser)
    add_report_flags(parser, picture="latencies and tokens over time")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    options = engine_options(arguments)

    from jaxllm.bench import latency
    from jaxllm.bench.picture import check_plots, draw_run
    from jaxllm.bench.session import Session

    check_plots(arguments.plot)
    with Session(arguments.model, **options) as session:
        sizes = lengths(arguments, "input_len", "output_len", "long_len")
        figures, best = latency.measure(session, rounds=arguments.rounds, **sizes)
        report = {"benchmark": "latency", "engine": session.about(), **figures}
    print_report(arguments, report)
    if arguments.plot:
        draw_run(best, arguments.plot)
    return 0
