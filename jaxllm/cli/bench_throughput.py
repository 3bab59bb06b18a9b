"""`jaxllm bench throughput`: many requests, at once or arriving at a rate."""

import argparse
from pathlib import Path

from jaxllm.cli.bench_options import add_length_flags, add_report_flags, add_rounds_flag, print_report, rate
from jaxllm.cli.following import follow_if_told
from jaxllm.cli.options import add_engine_flags, engine_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser)
    group = parser.add_argument_group(
        "workload", "Random token ids, greedy, each request to its full length."
    )
    add_length_flags(group, num_prompts="32", input_len="random, 32 to 256", output_len="128")
    group.add_argument(
        "--request-rate",
        type=rate,
        metavar="FLOAT",
        help="random arrivals a second (default: all at once)",
    )
    group.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE.jsonl",
        help="requests instead: on each line a JSON object with prompt, prompt_token_ids or messages, "
        "and output_len if it has its own",
    )
    add_rounds_flag(parser)
    add_report_flags(parser, picture="latencies and tokens over time")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    options = engine_options(arguments, several_hosts=True)
    if arguments.dataset and (arguments.num_prompts or arguments.input_len):
        arguments.usage_error("--dataset brings its own prompts: leave out --num-prompts and --input-len")

    if follow_if_told(arguments.model, options):
        return 0

    from jaxllm.bench import throughput, workload
    from jaxllm.bench.picture import check_plots, draw_run
    from jaxllm.bench.session import Session

    check_plots(arguments.plot)
    output_len = arguments.output_len or workload.OUTPUT_LEN
    found = workload.read_dataset(arguments.dataset, output_len) if arguments.dataset else None
    with Session(arguments.model, **options) as session:
        items = found or workload.make_items(
            session.vocab_size,
            num_prompts=arguments.num_prompts,
            input_len=arguments.input_len,
            output_len=arguments.output_len,
        )
        if arguments.request_rate:
            items = workload.with_arrivals(items, arguments.request_rate)
        figures, best = throughput.measure(session, items, arguments.rounds)
        report = {"benchmark": "throughput", "engine": session.about(), **figures}
    print_report(arguments, report)
    if arguments.plot:
        draw_run(best, arguments.plot)
    return 0
