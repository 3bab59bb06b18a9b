"""`jaxllm bench growth`: a step's time against what may make it longer."""

import argparse

from jaxllm.cli.bench_options import add_report_flags, at_least_one, print_report
from jaxllm.cli.options import add_engine_flags, engine_options

AXES = ("rows", "tokens", "context", "pages", "max_model_len", "waiting")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser)
    parser.add_argument(
        "--axis", action="append", choices=AXES, help="what to vary; may be given again (default: all)"
    )
    parser.add_argument(
        "--most", type=at_least_one, metavar="INT", help="leave out larger values than this on any axis"
    )
    add_report_flags(parser, picture="each axis")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    options = engine_options(arguments)

    from jaxllm.bench.growth import Growth
    from jaxllm.bench.picture import check_plots, draw_growth

    check_plots(arguments.plot)
    growth = Growth(arguments.model, options, most=arguments.most)
    axes = growth.measure(arguments.axis or AXES)
    if arguments.json:
        print_report(arguments, {"benchmark": "growth", "model": arguments.model, "axes": axes})
    else:
        for name, points in axes.items():
            print(name)
            for point in points:
                print_report(arguments, {f"  {point[name]}": {n: v for n, v in point.items() if n != name}})
    if arguments.plot:
        draw_growth(axes, arguments.plot)
    return 0
