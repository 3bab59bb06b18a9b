"""A plan as a picture: who is where on the chips, what fills one, and what a step's time goes to."""

import itertools
from pathlib import Path
from typing import Any

from jaxllm.plan.plan import Plan

PARTS = ("weights", "pages", "temporaries", "rows", "unused")
LABELLED = 64
"""Chips that still have room for a label each."""


def draw_plan(plan: Plan, file: Path) -> None:
    """Writes the picture. matplotlib is imported here; no window is opened."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    chips, memory, times = figure.subplots(1, 3, width_ratios=(1.3, 0.5, 1))
    figure.suptitle(f"{plan.model} on {plan.layout.target}, {plan.dtype}: an estimate, nothing was run")
    _draw_chips(plan, chips)
    _draw_memory(plan, memory)
    _draw_times(plan, times)
    figure.savefig(file)


def _draw_chips(plan: Plan, axes: Any) -> None:
    """A square for each chip, in its replica's colour; planes of a cube side by side."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    layout, colours = plan.layout, colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    shape = (*layout.target.shape, 1, 1)[:3] if len(layout.target.shape) > 1 else (1, *layout.target.shape, 1)
    rows, columns, planes = shape
    for index, replica in enumerate(_replicas(plan)):
        row, column, plane = index // planes // columns, index // planes % columns, index % planes
        x = plane * (columns + 0.5) + column
        axes.add_patch(Rectangle((x, row), 0.92, 0.92, color=colours[replica % len(colours)]))
        if layout.num_chips <= LABELLED:
            axes.text(x + 0.46, row + 0.46, str(replica), ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.1, planes * (columns + 0.5))
    axes.set_ylim(rows + 0.1, -0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{layout.data_parallel_size} replicas of {layout.replica_chips} chips")


def _replicas(plan: Plan) -> list[int]:
    """For each chip of the target, in row-major order, the replica that it belongs to."""
    target, size, chips = plan.layout.target.shape, plan.layout.replica_chips, plan.layout.num_chips
    if plan.layout.replica.num_chips != size:  # neighbours of a slice that several replicas share
        return [index // size for index in range(chips)]
    # a replica's shortest side lies along the target's
    axes = sorted(range(len(target)), key=target.__getitem__)
    block = dict(zip(axes, sorted(plan.layout.replica.shape), strict=True))
    numbers: dict[tuple[int, ...], int] = {}
    return [
        numbers.setdefault(tuple(place // block[axis] for axis, place in enumerate(position)), len(numbers))
        for position in itertools.product(*map(range, target))
    ]


def _draw_memory(plan: Plan, axes: Any) -> None:
    """One bar, from the weights at the bottom to what nothing takes."""
    bottom = 0.0
    for name in PARTS:
        size = getattr(plan.memory, name) / 1e9
        colour = "0.92" if name == "unused" else None
        axes.bar([0], [size], bottom=bottom, label=f"{name} {size:.2f} GB", color=colour)
        bottom += size
    axes.set(title="a chip's memory", ylabel="GB", xticks=[])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)


def _draw_times(plan: Plan, axes: Any) -> None:
    """A step's parts, one after the other."""
    steps = {
        f"prefill\n{plan.prefill.tokens} tokens": plan.estimate.prefill,
        f"decode\n{plan.estimate.requests} requests": plan.estimate.decode,
    }
    left = [0.0] * len(steps)
    for name in ("products", "kernels", "collectives", "sampling"):
        widths = [1e3 * getattr(time, name) for time in steps.values()]
        axes.barh(list(steps), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(title="a step at best", xlabel="ms")
    axes.legend(fontsize=8)
