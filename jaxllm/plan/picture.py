"""A plan as a picture: who is where on the chips, what fills one, and what a step's time goes to."""

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
    chips, memory, times = figure.subplots(1, 3, width_ratios=(1.3, 0.6, 1))
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
    for index, (replica, part) in enumerate(_places(plan)):
        row, column, plane = index // planes // columns, index // planes % columns, index % planes
        x = plane * (columns + 0.5) + column
        axes.add_patch(Rectangle((x, row), 0.92, 0.92, color=colours[replica % len(colours)]))
        if layout.num_chips <= LABELLED:
            axes.text(x + 0.46, row + 0.46, f"{replica}.{part}", ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.1, planes * (columns + 0.5))
    axes.set_ylim(rows + 0.1, -0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{layout.data_parallel_size} replicas of {layout.replica_chips} chips (replica.part)")


def _places(plan: Plan) -> list[tuple[int, int]]:
    """For each chip of the target, in row-major order, its replica and its number in it."""
    target, size = plan.layout.target.shape, plan.layout.replica_chips
    chips = plan.layout.num_chips
    if size == chips or len(target) == 1 or plan.layout.replica.num_chips != size:
        return [(index // size, index % size) for index in range(chips)]
    # sorted alike, since slices are named with the shortest side first
    order = sorted(range(len(target)), key=lambda axis: target[axis])
    block = [0] * len(target)
    for axis, length in zip(order, sorted(plan.layout.replica.shape), strict=True):
        block[axis] = length
    seen: dict[tuple[int, ...], int] = {}
    counts: dict[int, int] = {}
    places = []
    for index in range(chips):
        position, rest = [], index
        for length in reversed(target):
            position.append(rest % length)
            rest //= length
        corner = tuple(p // b for p, b in zip(reversed(position), block, strict=True))
        replica = seen.setdefault(corner, len(seen))
        places.append((replica, counts.setdefault(replica, 0)))
        counts[replica] += 1
    return places


def _draw_memory(plan: Plan, axes: Any) -> None:
    """One bar, from the weights at the bottom to what nothing takes."""
    bottom = 0.0
    for name in PARTS:
        size = getattr(plan.memory, name) / 1e9
        colour = "0.92" if name == "unused" else None
        axes.bar([0], [size], bottom=bottom, label=f"{name} {size:.2f} GB", color=colour)
        bottom += size
    axes.set(title="a chip's memory", ylabel="GB", xticks=[])
    axes.legend(fontsize=8, loc="lower right")


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
