"""`python -m pallas_kernels`: holds kernels to their cases, times them, and searches their blocks.

Exit codes: 0 done, 1 a case or a measurement failed, 2 called wrongly. Results go to stdout, all else to
stderr.
"""

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from pallas_kernels.bench import Measurement, Options, as_json, as_markdown, describe_machine, measure
from pallas_kernels.models import MODELS
from pallas_kernels.ops import Op, get_op, list_ops, runs_on
from pallas_kernels.proven import Verdict, select_cases, verify
from pallas_kernels.timing import Effort, measure_limits
from pallas_kernels.tune import search
from pallas_kernels.tuning import default_path, save

TUNED = Options(rows=(1, 32), context=(8192,), chunk=(2048,))
"""What blocks are searched with, unless told otherwise: fewer sizes than are timed, as each is often."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        sys.path.insert(0, os.getcwd())
        for module in arguments.modules:
            importlib.import_module(module)
        return arguments.run(arguments)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"pallas_kernels {arguments.command}: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        "python -m pallas_kernels", description="Checks, times and tunes kernels."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--op", choices=list_ops(), help="only this op")
    common.add_argument("--backend", help="only this backend")
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE",
        help="import this first, from the current folder too; for kernels that register themselves",
    )  # fmt: skip
    sizes = _sizes_parser()

    command = commands.add_parser("check", parents=[common], help="run each op's cases on its backends")
    command.add_argument(
        "--interpret", action="store_true", help="interpret kernels of other platforms, slowly"
    )
    command.add_argument("--cases", default="*", metavar="PATTERN", help="only cases with such names")
    command.set_defaults(run=run_check)

    command = commands.add_parser("bench", parents=[common, sizes], help="time ops on the device present")
    command.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write kernels.json and kernels.md there"
    )
    command.set_defaults(run=run_bench)

    command = commands.add_parser(
        "tune", parents=[common, sizes], help="search block sizes on the device present"
    )
    command.add_argument("--path", type=Path, help="the file to write; default: the op's own tuning.json")
    command.set_defaults(run=run_tune)
    return parser


def run_check(arguments: argparse.Namespace) -> int:
    """Prints what became of each backend's cases; a kernel that is named is interpreted if it must be."""
    platform = jax.default_backend()
    interpret = arguments.interpret or arguments.backend is not None
    verdicts: list[Verdict] = []
    if not arguments.json:
        print(f"{'op':16} {'backend':10} {'passed':>6} {'refused':>7} {'failed':>6}  how")
    for op, names in _selected(arguments):
        cases = select_cases(op, arguments.cases) if _case_named(arguments, op) else {}
        for name in names if cases else ():
            if interpret and not runs_on(op, name, platform) and platform == "cpu":
                _tell(f"interpreting {len(cases)} cases of {op.name}, {name}: seconds each")
            verdict = verify(op, name, platform, cases, interpret=interpret)
            verdicts.append(verdict)
            if not arguments.json:
                print(verdict, flush=True)
    if not verdicts:
        raise ValueError(f"no op has a case that matches {arguments.cases!r}")
    if arguments.json:
        print(
            json.dumps(
                {"machine": describe_machine(), "backends": [one.as_json() for one in verdicts]}, indent=1
            )
        )
    failed = any(one.counts()["failed"] for one in verdicts)
    nothing_passed = arguments.backend is not None and not any(one.counts()["passed"] for one in verdicts)
    return int(failed or nothing_passed)


def run_bench(arguments: argparse.Namespace) -> int:
    """Prints how long each workload takes on each backend, and what fraction of the limit that is."""
    effort = _effort(arguments)
    machine = describe_machine()
    _tell(", ".join(f"{name} {value}" for name, value in machine.items()))
    limits = measure_limits(effort, nbytes=arguments.copy_bytes, size=arguments.matmul_size)
    _tell(
        f"measured here: copies {limits.copy / 1e9:.1f} GB/s (read and written), products of bfloat16 "
        f"{limits.matmul / 1e12:.3f} TFLOP/s"
    )
    found: list[Measurement] = []
    for op, names in _selected(arguments):
        for workload in op.workloads(machine["platform"], machine["device"], _options(arguments, op)):
            for name in names:
                if arguments.backend is None and (
                    name == "reference" or not runs_on(op, name, machine["platform"])
                ):
                    continue
                found.append(measure(workload, op.registry.get(name), limits, effort, arguments.layers))
                if not arguments.json:
                    print(found[-1], flush=True)
    if arguments.json:
        print(json.dumps(as_json(limits, found), indent=1))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "kernels.json").write_text(json.dumps(as_json(limits, found), indent=1) + "\n")
        (arguments.output / "kernels.md").write_text(as_markdown(limits, found))
    return int(any(one.failed for one in found))


def run_tune(arguments: argparse.Namespace) -> int:
    """Searches blocks, and keeps those that are faster than the default and give the same result."""
    machine, results = describe_machine(), []
    effort = _effort(arguments)
    for op, names in _selected(arguments):
        tunable = [
            name
            for name in names
            if op.registry.get(name).tunable is not None and runs_on(op, name, machine["platform"])
        ]
        if not tunable:
            _tell(f"{op.name}: no backend for {machine['platform']} has blocks to choose")
            continue
        options = dataclasses.replace(
            TUNED, **{name: value for name, value in vars(_options(arguments, op)).items() if value}
        )
        workloads = op.workloads(machine["platform"], machine["device"], options)
        path = arguments.path or default_path(op.name)
        for name in tunable:
            for found in search(op.registry.get(name), workloads, effort, arguments.layers, _tell):
                results.append({"op": op.name, "backend": name, **vars(found)})
                if found.blocks:
                    measured = {**machine, "gain": round(found.gain, 3)}
                    save(path, name, machine["device"], found.key, found.blocks, measured)
                if not arguments.json:
                    kept = (
                        f"{found.blocks}, {found.gain:.2f} times as fast"
                        if found.blocks
                        else "the default stays"
                    )
                    print(f"{op.name} {name} {dict(found.key)}: {kept}; {found.tried} tried", flush=True)
    if arguments.json:
        print(json.dumps({"machine": machine, "found": results}, indent=1))
    return int(any(one["wrong"] for one in results))


def _sizes_parser() -> argparse.ArgumentParser:
    """Flags that say what to time."""
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--model", choices=sorted(MODELS), help="whose sizes; default: one for the platform")
    for name, what in (
        ("rows", "rows of decode, or tokens"),
        ("context", "keys of a row"),
        ("chunk", "of prefill"),
    ):
        sizes.add_argument(f"--{name}", type=_numbers, default=(), metavar="N,N,...", help=what)
    sizes.add_argument("--page-size", type=_number, help="tokens of a page")
    sizes.add_argument("--page-dtype", choices=("bfloat16", "int8", "float8_e4m3fn"), help="of the cache")
    sizes.add_argument("--layers", type=_number, help="at most so many with pools or weights of their own")
    sizes.add_argument("--repeats", type=_number, default=5, help="the median of so many")
    sizes.add_argument("--seconds", type=float, default=0.1, help="that each repetition takes about")
    sizes.add_argument(
        "--copy-bytes", type=_number, help="of the array by which the copy bandwidth is measured"
    )
    sizes.add_argument("--matmul-size", type=_number, help="of the matrices by which the rate is measured")
    return sizes


def _selected(arguments: argparse.Namespace) -> list[tuple[Op, list[str]]]:
    """The ops and backends that were asked for.

    Raises:
        ValueError: no op has a backend of that name.
    """
    ops = [get_op(name) for name in ([arguments.op] if arguments.op else list_ops())]
    if arguments.backend is None:
        return [(op, op.registry.names()) for op in ops]
    having = [(op, [arguments.backend]) for op in ops if arguments.backend in op.registry.names()]
    if not having:
        known = sorted({name for op in ops for name in op.registry.names()})
        raise ValueError(
            f"backend {arguments.backend!r}: there is no such backend; there are {', '.join(known)}"
        )
    return having


def _case_named(arguments: argparse.Namespace, op: Op) -> bool:
    """Whether to look for cases in this op: one without any is passed by where all ops are checked."""
    if arguments.op:
        return True
    try:
        select_cases(op, arguments.cases)
    except ValueError:
        return False
    return True


def _options(arguments: argparse.Namespace, op: Op) -> Options:
    """What was asked for; without `--op` a model without experts is none for an op that needs them."""
    model = arguments.model
    if op.name == "grouped_matmul" and model and not arguments.op and MODELS[model].experts is None:
        model = None
    return Options(
        model, arguments.rows, arguments.context, arguments.chunk, arguments.page_size, arguments.page_dtype
    )


def _effort(arguments: argparse.Namespace) -> Effort:
    return Effort(arguments.repeats, arguments.seconds)


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(","))


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
