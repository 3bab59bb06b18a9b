"""Which layouts of which chips serve a model best."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxllm.plan.layout import Layout, chips_per_host, divisors
from jaxllm.plan.memory import TooLargeError, require_weights
from jaxllm.plan.plan import Plan
from jaxllm.plan.planner import Planner
from pallas_kernels.targets import Target

MOST_CHIPS = 64
"""Of a replica that is advised: models have no more heads to share."""


@dataclass(frozen=True)
class Refusal:
    """A layout that does not serve the model, and why."""

    layout: str
    reason: str


@dataclass(frozen=True)
class Search:
    """All layouts that were tried.

    Attributes:
        plans: best first: by output tokens per dollar where prices were given, else by output tokens/s.
    """

    plans: Sequence[Plan]
    refusals: Sequence[Refusal]


Outcome = Plan | Refusal
"""Of a layout that was tried."""


def search(
    planner: Planner,
    targets: Sequence[Target],
    prices: Sequence[float | None],
    tell: Callable[[str, Outcome], None] | None = None,
) -> Search:
    """Plans every layout of the targets.

    Args:
        prices: of a chip-hour, for each target.
        tell: is given what came of each layout as soon as it is known, after how far the search is and which
            layout it was, such as "3 of 9, v5e:2x4, tensor 4, expert 1, stages 1".

    Raises:
        RuntimeError: the compiler for a target is not installed.
        ValueError: no layout serves the model; the message has the reasons.
    """
    tried = [
        (target, sizes, price)
        for target, price in zip(targets, prices, strict=True)
        for sizes in _sizes(planner, target)
    ]
    plans: list[Plan] = []
    refusals: list[Refusal] = []
    for number, (target, sizes, price) in enumerate(tried, 1):
        where = f"{number} of {len(tried)}, {target}, {sizes}"
        outcome = _try(replace(planner, where=where), target, sizes, price)
        if isinstance(outcome, Plan):
            plans.append(outcome)
        else:
            refusals.append(outcome)
        if tell is not None:
            tell(where, outcome)
    if not plans:
        reasons = "\n".join(f"  {one.layout}: {one.reason}" for one in refusals)
        raise ValueError(f"no layout serves {planner.config.model.model}:\n{reasons}")
    return Search(sorted(plans, key=_worth, reverse=True), refusals)


class Sizes(NamedTuple):
    """Of a layout: `groups` above 1 are data groups on all chips, else there are replicas on what is left."""

    tensor: int
    expert: int
    stages: int
    groups: int = 1

    def __str__(self) -> str:
        groups = f", data groups {self.groups}" if self.groups > 1 else ""
        return f"tensor {self.tensor}, expert {self.expert}, stages {self.stages}{groups}"


def _try(planner: Planner, target: Target, sizes: Sizes, price: float | None) -> Outcome:
    try:
        layout = Layout.make(
            target,
            sizes.tensor,
            sizes.expert,
            pipeline=sizes.stages,
            data_parallel_experts=sizes.groups > 1,
        )
        return planner.plan(layout, price)
    except (NotImplementedError, ValueError) as error:
        return Refusal(f"{target}, {sizes}", str(error))


def _sizes(planner: Planner, target: Target) -> Iterator[Sizes]:
    """All that are tried.

    Experts are either cut or whole: what lies between is left out. Stages, and data groups of models with
    experts, are tried within a host.
    """
    model = planner.uncut_model
    for chips in divisors(target.num_chips):
        within_host = chips <= chips_per_host(target)
        for stages in divisors(chips) if within_host else [1]:
            if stages <= model.num_layers:
                yield Sizes(chips // stages, 1, stages)
                if model.mixture is not None and chips > stages:
                    yield Sizes(1, chips // stages, stages)
    if model.mixture is None or target.num_chips > chips_per_host(target):
        return
    for chips in divisors(target.num_chips)[:-1]:
        yield Sizes(chips, 1, 1, target.num_chips // chips)
        if chips > 1:
            yield Sizes(1, chips, 1, target.num_chips // chips)


def plan_or_advise(planner: Planner, layout: Layout, price_per_chip_hour: float | None = None) -> Plan:
    """The plan for a layout; where the model is too large for it, the error says what would hold it.

    Raises:
        TooLargeError: it is.
    """
    try:
        return planner.plan(layout, price_per_chip_hour)
    except TooLargeError as error:
        parts = [f"{planner.config.model.model} on {layout}: {error}", _advice(planner, layout)]
        if (method := planner.quantization) is not None:
            note = f"weights of {method} count as bfloat16, which the engine makes of them when it loads"
            parts.insert(1, note)
        message = "; ".join(parts)
        raise TooLargeError(message) from error


def _worth(plan: Plan) -> tuple[float, float]:
    found = plan.estimate
    return (found.tokens_per_dollar or 0.0, found.output_tokens_per_second)


def _advice(planner: Planner, layout: Layout) -> str:
    """What holds a model's weights where a layout does not, in words."""
    for other in _larger(layout):
        try:
            require_weights(planner.config, other, planner.programs(other)[1].lowerings)
        except (NotImplementedError, ValueError):
            continue
        return f"{other} would hold them"
    return f"no slice of {layout.target.chip.name} that could be tried would hold them"


def _larger(layout: Layout) -> Iterator[Layout]:
    """Layouts with more chips a stage, on the same target and then on larger ones; of data groups such."""
    chip, grouped = layout.target.chip, layout.data_parallel_experts
    experts = layout.expert_parallel_size > 1
    slices = [Target.parse(f"{chip.name}:{name}") for name in chip.slices]
    for target in (layout.target, *(one for one in slices if one.num_chips > layout.target.num_chips)):
        for size in divisors(target.num_chips):
            more = layout.group_chips < size or (grouped and layout.num_chips < target.num_chips)
            if more and size <= MOST_CHIPS:
                try:
                    sizes = (1, size) if experts else (size, 1)
                    pipeline = layout.pipeline_parallel_size
                    yield Layout.make(target, *sizes, pipeline=pipeline, data_parallel_experts=grouped)
                except ValueError:
                    continue
