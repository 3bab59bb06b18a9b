"""A plan as a picture: who is where on the chips, what fills one, and what a step's time goes to."""

import itertools
from pathlib import Path
from typing import Any

from jaxllm.plan.plan import Plan
from jaxllm.wording import counted

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
    """A square for each chip, in the colour of its replica or data group, stages in shades.

    Planes of a cube are side by side.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    layout, colours = plan.layout, colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    shape = (*layout.target.shape, 1, 1)[:3] if len(layout.target.shape) > 1 else (1, *layout.target.shape, 1)
    rows, columns, planes = shape
    staged = layout.pipeline_parallel_size > 1
    for index, (replica, stage) in enumerate(_owners(plan)):
        row, column, plane = index // planes // columns, index // planes % columns, index % planes
        x = plane * (columns + 0.5) + column
        colour, alpha = colours[replica % len(colours)], 0.6 if stage % 2 else 1.0
        axes.add_patch(Rectangle((x, row), 0.92, 0.92, color=colour, alpha=alpha))
        if layout.num_chips <= LABELLED:
            label = f"{replica}\nstage {stage}" if staged else str(replica)
            axes.text(x + 0.46, row + 0.46, label, ha="center", va="center", fontsize=6 if staged else 8)
    axes.set_xlim(-0.1, planes * (columns + 0.5))
    axes.set_ylim(rows + 0.1, -0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    stages = f" in {layout.pipeline_parallel_size} stages" if staged else ""
    if layout.data_parallel_experts:
        axes.set_title(f"{layout.num_groups} data groups of {layout.group_chips} chips")
    else:
        axes.set_title(
            f"{counted(layout.num_replicas, 'replica')} of {counted(layout.replica_chips, 'chip')}{stages}"
        )


def _owners(plan: Plan) -> list[tuple[int, int]]:
    """For each chip of the target, in row-major order, its replica or data group, and its stage."""
    layout = plan.layout
    if layout.data_parallel_experts:
        group_of = {place: n // layout.group_chips for n, place in enumerate(plan.stages[0].chips)}
        return [(group_of[place], 0) for place in itertools.product(*map(range, layout.target.shape))]
    target, size, chips = layout.target.shape, layout.replica_chips, layout.num_chips
    if layout.replica.num_chips != size:  # neighbours of a slice that several replicas share
        return [(index // size, index % size // layout.stage_chips) for index in range(chips)]
    stage_of = {place: index for index, stage in enumerate(plan.stages) for place in stage.chips}
    # a replica's shortest side lies along the target's
    axes = sorted(range(len(target)), key=target.__getitem__)
    sides = sorted(range(len(target)), key=layout.replica.shape.__getitem__)
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    for position in itertools.product(*map(range, target)):
        block, inside = [0] * len(target), [0] * len(target)
        for axis, side in zip(axes, sides, strict=True):
            block[axis], inside[side] = divmod(position[axis], layout.replica.shape[side])
        found.append((numbers.setdefault(tuple(block), len(numbers)), stage_of[tuple(inside)]))
    return found


def _draw_memory(plan: Plan, axes: Any) -> None:
    """A bar for each stage, from the weights at the bottom to what nothing takes."""
    stages, staged = range(len(plan.stages)), len(plan.stages) > 1
    bottom = [0.0 for _ in stages]
    for name in PARTS:
        sizes = [getattr(stage.memory, name) / 1e9 for stage in plan.stages]
        colour = "0.92" if name == "unused" else None
        label = name if staged else f"{name} {sizes[0]:.2f} GB"
        axes.bar(stages, sizes, bottom=bottom, label=label, color=colour)
        bottom = [start + size for start, size in zip(bottom, sizes, strict=True)]
    axes.set(title="a chip's memory", ylabel="GB", xticks=stages if staged else [])
    if staged:
        axes.set(xlabel="stage")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)


def _draw_times(plan: Plan, axes: Any) -> None:
    """The parts of a step of the slowest stage, one after the other."""
    slowest, found = plan.slowest, plan.estimate
    steps = {
        f"prefill\n{plan.stages[slowest].prefill.tokens} tokens": found.prefill[slowest],
        f"decode\n{-(-found.requests // len(plan.stages))} requests": found.decode[slowest],
    }
    left = [0.0] * len(steps)
    for name in ("products", "kernels", "collectives", "sampling"):
        widths = [1e3 * getattr(time, name) for time in steps.values()]
        axes.barh(list(steps), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    where = f" in stage {slowest}" if len(plan.stages) > 1 else ""
    axes.set(title=f"a step at best{where}", xlabel="ms")
    axes.legend(fontsize=8)
