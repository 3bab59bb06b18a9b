"""`jaxllm run-batch`: requests in OpenAI's batch format, answered by a model here or by a server."""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jaxllm.cli.bench_options import at_least_one
from jaxllm.cli.options import add_engine_flags, engine_options, engine_options_given
from jaxllm.cli.remote import add_server_flags, server_headers
from jaxllm.config import EngineConfig
from jaxllm.wording import counted

CONCURRENCY = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_engine_flags(parser, model_may_lack=True)
    add_server_flags(parser)
    file = {"type": Path, "metavar": "FILE.jsonl", "required": True}
    parser.add_argument("-i", "--input-file", **file, help="requests, one on each line")
    parser.add_argument(
        "-o",
        "--output-file",
        **file,
        help="answers, one on each line; requests that have one already are not sent again, others are",
    )
    parser.add_argument(
        "--max-concurrency",
        type=at_least_one,
        default=CONCURRENCY,
        metavar="INT",
        help=f"most requests under way (default: {CONCURRENCY})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Answers what has not been answered yet; 1 if something got no answer, or an error for one."""
    if (arguments.model is None) == (arguments.url is None):
        arguments.usage_error("give MODEL to load it here, or --url to ask a server")
    options: dict[str, Any] = {}
    if arguments.url is None:
        options = {"progress": False} | engine_options(arguments)
    elif flags := engine_options_given(arguments):
        arguments.usage_error(f"with --url the engine is the server's: leave out {', '.join(flags)}")

    from jaxllm.server.batch import read_done, read_requests

    requests = read_requests(arguments.input_file)
    done = read_done(arguments.output_file)
    left = [request for request in requests if request.custom_id not in done]
    before = len(requests) - len(left)
    print(f"{counted(len(requests), 'request')}, {before} answered before", file=sys.stderr)
    failures = asyncio.run(_answer(arguments, options, left)) if left else []
    if failures:
        print(
            f"{len(failures)} of {counted(len(left), 'request')} failed; see {arguments.output_file}\n"
            f"the first: {failures[0]}",
            file=sys.stderr,
        )
    return 1 if failures else 0


async def _answer(arguments: argparse.Namespace, options: dict[str, Any], requests: list[Any]) -> list[str]:
    from tqdm import tqdm

    from jaxllm.server.batch import run_batch

    with (
        arguments.output_file.open("a", encoding="utf-8") as output,
        tqdm(total=len(requests), unit="request", disable=None) as bar,
    ):
        async with _client(arguments, options) as client:
            concurrency = arguments.max_concurrency
            return await run_batch(client, requests, output, concurrency=concurrency, note=bar.update)


@asynccontextmanager
async def _client(arguments: argparse.Namespace, options: dict[str, Any]) -> AsyncIterator[Any]:
    """A client of the server; without one, of an app in this process that nobody else can reach."""
    import httpx2

    if arguments.url is not None:
        headers = server_headers(arguments)
        async with httpx2.AsyncClient(base_url=arguments.url, headers=headers, timeout=None) as client:
            yield client
        return

    from jaxllm.server.app import create_app
    from jaxllm.server.config import LimitConfig, LogConfig, ServerConfig
    from jaxllm.server.keys import Keys
    from jaxllm.server.service import Service

    # nobody waits for an answer here, so none may be given up
    limits = LimitConfig(request_timeout=1e9, max_num_queued_reqs=10**9, max_body_bytes=1 << 30)
    config = ServerConfig(limits=limits, log=LogConfig(disable_log_requests=True))
    service = Service(config, EngineConfig.create(arguments.model, **options))
    service.load()
    try:
        await service.wait_loaded()
        transport = httpx2.ASGITransport(create_app(service, Keys([])))
        async with httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:
            yield client
    finally:
        await service.close()
