"""`jaxllm bench serve`: a server under load, seen from its clients."""

import argparse
import itertools
from pathlib import Path

from jaxllm.bench import workload
from jaxllm.cli.bench_options import add_length_flags, add_report_flags, at_least_one, print_report, rate
from jaxllm.cli.remote import add_server_flags, server_headers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_server_flags(parser, url_default="http://127.0.0.1:8000")
    group = parser.add_argument_group(
        "workload", "Random token ids, greedy, each request to its full length."
    )
    add_length_flags(group, num_prompts="32", input_len="random, 32 to 256", output_len="128")
    group.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE.jsonl",
        help="requests instead: on each line a JSON object with prompt, prompt_token_ids or messages, "
        "and output_len if it has its own",
    )
    group.add_argument(
        "--vocab-size",
        type=at_least_one,
        default=workload.VOCAB_SIZE,
        metavar="INT",
        help=f"tokens that the model knows, if fewer than {workload.VOCAB_SIZE}",
    )
    load = parser.add_argument_group("load", "Several values are measured in turn, each with each.")
    load.add_argument(
        "--request-rate",
        type=rate,
        nargs="+",
        default=[None],
        metavar="FLOAT",
        help="random arrivals a second (default: all at once)",
    )
    load.add_argument(
        "--max-concurrency",
        type=at_least_one,
        nargs="+",
        default=[None],
        metavar="INT",
        help="most requests under way (default: no limit)",
    )
    add_report_flags(parser, picture="tokens a second and latencies for each load")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    if arguments.dataset and (arguments.num_prompts or arguments.input_len):
        arguments.usage_error("--dataset brings its own prompts: leave out --num-prompts and --input-len")

    import uvloop  # a third less work for each chunk, which a server on the same cores can use

    from jaxllm.bench import serving
    from jaxllm.bench.picture import check_plots, draw_loads

    check_plots(arguments.plot)
    output_len = arguments.output_len or workload.OUTPUT_LEN
    if arguments.dataset:
        items = workload.read_dataset(arguments.dataset, output_len)
    else:
        items = workload.make_items(
            arguments.vocab_size,
            num_prompts=arguments.num_prompts,
            input_len=arguments.input_len,
            output_len=output_len,
        )
    pairs = itertools.product(arguments.request_rate, arguments.max_concurrency)
    loads = [serving.Load(per_second, clients) for per_second, clients in pairs]
    target = serving.Target(arguments.url, arguments.model_name, server_headers(arguments))
    report = uvloop.run(serving.measure(target, items, loads))
    print_report(arguments, report)
    if arguments.plot:
        draw_loads({str(load): report[str(load)] for load in loads}, arguments.plot)
    return 0
