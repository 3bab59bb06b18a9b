"""Pictures of what was measured. matplotlib is imported when one is drawn."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.wording import how_to_install

if TYPE_CHECKING:
    from jaxllm.bench.session import Run


def check_plots(file: Path | None) -> None:
    """Before anything is measured: whether the picture can be drawn, if one is wanted.

    Raises:
        RuntimeError: matplotlib is not installed; the message says how to install it.
        ValueError: there is no such folder.
    """
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.absolute().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"--plot needs matplotlib: {how_to_install('notebook')}") from error


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with some panels side by side, in rows of three; no window is opened."""
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def draw_run(run: "Run", file: Path) -> None:
    """Tokens over time, the time between them, and the parts of each step."""
    figure, (tokens, latencies, steps) = _panels(3)
    recording = run.recording
    times = sorted(recording.token_times)
    tokens.plot([time - times[0] for time in times], range(1, len(times) + 1))
    tokens.set(title="output tokens", xlabel="seconds from the first one", ylabel="tokens")
    latencies.hist([1e3 * seconds for seconds in recording.token_latencies], bins=40)
    latencies.set(title="from a token to the next", xlabel="ms", ylabel="tokens")
    turns = recording.steps
    for part in ("schedule", "pack", "dispatch", "process", "gap"):
        steps.plot([1e3 * getattr(turn, part) for turn in turns], label=part)
    steps.set(title="host", xlabel="step", ylabel="ms", yscale="log")
    steps.legend()
    figure.savefig(file)


def draw_loads(loads: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """For each load tokens/s, and the median and 99th percentile of the latencies."""
    figure, (rates, first, between) = _panels(3)
    places = range(len(loads))
    rates.bar(places, [load["output_tokens_per_second"] for load in loads.values()])
    rates.set(title="output tokens/s")
    for panel, name, title in (
        (first, "ttft_seconds", "to the first token"),
        (between, "itl_seconds", "ITL"),
    ):
        for share in ("p50", "p99"):
            values = [1e3 * (load[name] or {}).get(share, 0.0) for load in loads.values()]
            panel.plot(places, values, marker="o", label=share)
        panel.set(title=title, ylabel="ms")
        panel.legend()
    for panel in (rates, first, between):
        panel.set_xticks(places, list(loads), rotation=30, ha="right")
    figure.savefig(file)


def draw_prefix(report: Mapping[str, Any], file: Path) -> None:
    """Bars of time to the first token and of total tokens/s."""
    figure, axes = _panels(2)
    names = ("off", "cold", "warm")
    titles = {"ttft_seconds_mean": "seconds to the first token", "total_tokens_per_second": "total tokens/s"}
    for panel, (figure_name, title) in zip(axes, titles.items(), strict=True):
        panel.bar(names, [report[name][figure_name] for name in names])
        panel.set(title=f"{title}, {report['shared_len']} shared tokens")
    figure.savefig(file)


def draw_startup(report: Mapping[str, Any], file: Path) -> None:
    """The phases of a cold and of a warm start, one after the other."""
    figure, axes = _panels(2)
    for panel, name in zip(axes, ("cold", "warm"), strict=True):
        phases = report[name]["phases"]
        starts = itertools.accumulate(phases.values(), initial=0.0)
        panel.barh(list(phases), list(phases.values()), left=list(starts)[:-1])
        panel.invert_yaxis()
        panel.set(title=f"{name}: {report[name]['seconds']:.1f} s to the first token", xlabel="seconds")
    figure.savefig(file)


def draw_scheduler(report: Mapping[str, Any], file: Path) -> None:
    """Microseconds of a step against waiting requests, a line for each number of rows."""
    figure, [panel] = _panels(1)
    for running in dict.fromkeys(point["running"] for point in report["points"]):
        points = [point for point in report["points"] if point["running"] == running]
        waiting, costs = ([point[name] for point in points] for name in ("waiting", "step_us"))
        panel.plot(waiting, costs, marker="o", label=f"{running} rows")
    panel.set(xscale="log", yscale="log", xlabel="requests waiting", ylabel="microseconds a step")
    panel.legend()
    figure.savefig(file)


def draw_growth(axes: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """A step's time and the host's part of it against each axis."""
    figure, panels = _panels(len(axes))
    for panel, (name, points) in zip(panels, axes.items(), strict=True):
        for line in ("step_ms", "host_ms"):
            panel.plot([point[name] for point in points], [point[line] for point in points], "o-", label=line)
        panel.set(xlabel=name.replace("_", " "), ylabel="ms", ylim=(0, None))
        panel.legend()
    figure.savefig(file)
