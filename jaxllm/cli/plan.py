"""`jaxllm plan`: what a model would take and give on chips that need not be there."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from jaxllm.cli.bench_options import add_report_flags, at_least_one, rate
from jaxllm.cli.flags import add_flags, given
from jaxllm.config import EngineConfig, option_fields
from jaxllm.plan.options import PLANNED

if TYPE_CHECKING:
    from jaxllm.plan.planner import Planner
    from jaxllm.plan.search import Outcome
    from pallas_kernels.targets import Target

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""Keeps jax from looking for the chips whose compilers are installed, and lets several processes compile."""
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
"""Else the compilers complain on stderr that there are no chips."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "model", metavar="MODEL", help="a repo id, folder, config.json or GGUF file; no weights are read"
    )
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="CHIPS",
        help="chips, such as v5e:2x4, v5p:2x2x4 or h100:8; with --search may be given again",
    )
    parser.add_argument(
        "--data-parallel-size",
        type=at_least_one,
        metavar="INT",
        help="replicas, which share requests, or data groups (default: as many as there are chips for)",
    )
    parser.add_argument(
        "--data-parallel-experts",
        action="store_true",
        help="data groups of one engine, whose experts lie over the chips of all groups, instead of replicas",
    )
    parser.add_argument(
        "--few-layers",
        action="store_true",
        help="compile models of a few layers only and extrapolate, which is quicker for deep models",
    )
    _add_workload(parser)
    _add_search(parser)
    group = parser.add_argument_group("engine options", "What the engine would be started with.")
    for name, part in get_type_hints(EngineConfig).items():
        fields = [f for owner, f in option_fields() if owner.name == name and f.name in PLANNED]
        add_flags(group, part, fields)
    parser.add_argument(
        "--save",
        metavar="DIR",
        type=Path,
        help="keep all programs for hosts of that kind to start from (TPU slices of one host; "
        "loading them there is untested)",
    )
    add_report_flags(parser, picture="the mesh, a chip's memory and a step's time")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload", "Requests that are all alike, as many at a time as fit.")
    texts = {
        "input_len": "tokens of each prompt (default: 1024)",
        "output_len": "tokens generated for each request (default: 256)",
        "concurrency": "requests at a time on each replica, or in each data group "
        "(default: as many as a step and the pages hold)",
    }
    for name, text in texts.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=at_least_one, metavar="INT", default=argparse.SUPPRESS, help=text)


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        action="store_true",
        help="try all layouts of the targets that fit, and rank them; experts are cut or whole. A layout "
        "takes minutes, with --few-layers one or two; stderr says how many there are and what comes of each",
    )
    group.add_argument(
        "--price-per-chip-hour",
        action="append",
        type=rate,
        metavar="DOLLARS",
        help="what a chip costs; given once, or once for each target",
    )


def run(arguments: argparse.Namespace) -> int:
    """Plans and prints."""
    _check(arguments)
    os.environ.update(ENVIRONMENT)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)

    with _without_messages():
        import jax

    from jaxllm.bench.picture import check_plots
    from jaxllm.plan.planner import planner_of
    from jaxllm.plan.workload import Workload
    from pallas_kernels.targets import Target

    check_plots(arguments.plot)
    names = ("input_len", "output_len", "concurrency")
    workload = Workload(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
    targets = [Target.parse(name) for name in arguments.target]
    options = given(arguments, [f for _, f in option_fields() if f.name in PLANNED])
    with _without_messages():
        jax.devices()
        for target in targets:
            target.devices()
    planner = planner_of(arguments.model, workload, few_layers=arguments.few_layers, options=options)
    with _ended_by_signals():
        if arguments.search:
            return _search(arguments, planner, targets)
        return _plan(arguments, planner, targets[0])


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, as they do with programs that say nothing about them.

    Python would raise KeyboardInterrupt when the compiler is back, which takes minutes, and libtpu prints its
    own stack at SIGTERM. Nothing is left half written: programs that are kept get their names last.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
    """Without what compilers write to stderr when they are loaded: that there are no chips.

    They do so by themselves, past Python and before any setting of theirs is read. Errors are raised.
    """
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check(arguments: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    targets, prices = arguments.target, arguments.price_per_chip_hour or []
    if len(targets) > 1 and not arguments.search:
        arguments.usage_error("--target: several of them need --search")
    if len(prices) not in (0, 1, len(targets)):
        arguments.usage_error(
            f"--price-per-chip-hour: give it once, or for each of the {len(targets)} targets"
        )
    if arguments.search and arguments.save:
        arguments.usage_error("--save: keeps one layout's programs; leave out --search")
    if arguments.search:
        for axis in ("tensor", "expert", "pipeline", "data"):
            name = f"{axis}_parallel_size"
            if getattr(arguments, name, None) is not None:
                arguments.usage_error(f"--{name.replace('_', '-')}: --search tries all; leave it out")
        if arguments.data_parallel_experts:
            arguments.usage_error("--data-parallel-experts: --search tries both; leave it out")


def _prices(arguments: argparse.Namespace) -> list[float | None]:
    """One for each target."""
    prices: list[float | None] = arguments.price_per_chip_hour or [None]
    return prices if len(prices) == len(arguments.target) else prices * len(arguments.target)


def _plan(arguments: argparse.Namespace, planner: "Planner", target: "Target") -> int:
    from jaxllm.plan.picture import draw_plan
    from jaxllm.plan.saving import check_saving
    from jaxllm.plan.search import plan_or_advise
    from jaxllm.plan.table import plan_table

    layout = planner.layout(
        target, arguments.data_parallel_size, data_parallel_experts=arguments.data_parallel_experts
    )
    if arguments.save:
        check_saving(arguments.save, layout)
    plan = plan_or_advise(planner, layout, _prices(arguments)[0])
    print(json.dumps(plan.to_dict()) if arguments.json else plan_table(plan))
    if arguments.plot:
        draw_plan(plan, arguments.plot)
    if arguments.save:
        print(planner.save(plan, arguments.save), file=sys.stderr)
    return 0


def _search(arguments: argparse.Namespace, planner: "Planner", targets: "list[Target]") -> int:
    from jaxllm.plan.picture import draw_plan
    from jaxllm.plan.search import search
    from jaxllm.plan.table import search_table

    tell = _tell if planner.progress else None
    found = search(planner, targets, _prices(arguments), tell)
    report: dict[str, Any] = {
        "plans": [plan.to_dict() for plan in found.plans],
        "refused": [vars(refusal) for refusal in found.refusals],
    }
    print(json.dumps(report) if arguments.json else search_table(found))
    if arguments.plot:
        draw_plan(found.plans[0], arguments.plot)
    return 0


def _tell(where: str, outcome: "Outcome") -> None:
    """Says on stderr what came of one layout of a search."""
    from jaxllm.plan.search import Refusal

    if isinstance(outcome, Refusal):
        found = outcome.reason
    else:
        found = f"{outcome.estimate.output_tokens_per_second:,.0f} output tokens/s"
        if (worth := outcome.estimate.tokens_per_dollar) is not None:
            found += f", {worth:,.0f} a dollar"
    print(f"{where}: {found}", file=sys.stderr)
