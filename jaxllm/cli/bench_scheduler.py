"""`jaxllm bench scheduler`: what planning costs the host."""

import argparse

from jaxllm.cli.bench_options import add_report_flags, at_least_one, print_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--steps", type=at_least_one, default=300, metavar="INT", help="steps of each point (default: 300)"
    )
    parser.add_argument(
        "--waiting", type=at_least_one, action="append", metavar="INT",
        help="requests that wait; may be given again (default: 10, 100, 1000 and 10000)",
    )  # fmt: skip
    parser.add_argument(
        "--running", type=at_least_one, action="append", metavar="INT",
        help="rows that decode; may be given again (default: 1, 32 and 256)",
    )  # fmt: skip
    add_report_flags(parser, picture="microseconds against waiting requests")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    from jaxllm.bench import scheduler
    from jaxllm.bench.picture import check_plots, draw_scheduler

    check_plots(arguments.plot)
    figures = scheduler.measure(
        waiting=arguments.waiting or scheduler.WAITING,
        running=arguments.running or scheduler.RUNNING,
        steps=arguments.steps,
    )
    report = {"benchmark": "scheduler", **figures}
    if arguments.json:
        print_report(arguments, report)
    else:
        print(f"{'running':>8} {'waiting':>8} {'schedule us':>12} {'complete us':>12} {'a step us':>12}")
        for point in report["points"]:
            times = (point[name] for name in ("schedule_us", "complete_us", "step_us"))
            print(f"{point['running']:8} {point['waiting']:8} " + " ".join(f"{t:12.1f}" for t in times))
    if arguments.plot:
        draw_scheduler(report, arguments.plot)
    return 0
