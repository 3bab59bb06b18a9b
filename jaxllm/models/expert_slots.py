"""Parameters of experts that are kept more than once: what of them a checkpoint has, and the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxllm.layers.expert_copies import TABLE, Copies, gather_slots
from jaxllm.models.abstract import Parameter
from jaxllm.models.fitting import place
from jaxllm.parallel.placement import Placement


class ExpertLayer(NamedTuple):
    """Where among a model's parameters those of one layer's experts are."""

    table: int
    """Of the experts' slots."""
    weights: tuple[int, ...]
    """Whose first axis is that of slots."""


def expert_layers(parameters: Mapping[str, Parameter]) -> tuple[ExpertLayer, ...]:
    """The layers whose experts have slots, in order; none where experts are not copied."""
    places = {path: index for index, path in enumerate(parameters)}
    found = []
    for path, parameter in parameters.items():
        if parameter.axes == TABLE:
            experts = path.removesuffix("copies.table")
            own = [one for one in parameters if one.startswith(experts) and _has_slots(parameters[one])]
            found.append(ExpertLayer(places[path], tuple(places[one] for one in own)))
    return tuple(found)


def stored_parameters(parameters: Mapping[str, Parameter], copies: Copies | None) -> dict[str, Parameter]:
    """What checkpoints have of them: each expert once, and no tables."""
    if copies is None:
        return dict(parameters)
    return {
        path: replace(one, shape=(copies.experts, *one.shape[1:])) if _has_slots(one) else one
        for path, one in parameters.items()
        if one.axes != TABLE
    }


def fill_slots(
    stored: Sequence[Array], parameters: Mapping[str, Parameter], copies: Copies, mesh: Mesh
) -> tuple[Array, ...]:
    """All parameters from those that checkpoints have, with as few copies of each expert as can be.

    Beside them the devices hold one array of the experts of one layer. Arrays that are copied are freed.

    Args:
        stored: in the order of `stored_parameters`, on the mesh.
        parameters: of a model, or of one of its stages.
    """
    placement = copies.even(1)
    source = placement.sources(Placement.plain(1, copies.experts, copies.devices), 0)
    shardings = {one.kept(mesh).sharding for one in parameters.values() if _has_slots(one)}
    gather = {sharding: jax.jit(partial(gather_slots, sharding=sharding)) for sharding in shardings}
    arrays, filled = iter(stored), []
    for parameter in parameters.values():
        if parameter.axes == TABLE:
            filled.append(place(placement.tables(copies.most)[0], parameter, mesh))
        elif _has_slots(parameter):
            once = next(arrays)
            filled.append(gather[parameter.kept(mesh).sharding](once, source).block_until_ready())
            once.delete()
        else:
            filled.append(next(arrays))
    return tuple(filled)


def _has_slots(parameter: Parameter) -> bool:
    return parameter.axes[0] == "experts"
