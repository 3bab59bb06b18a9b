"""Weights from a checkpoint into their shards, tensor by tensor."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm.auto import tqdm

from converters.checkpoint import Checkpoint, ShardedCheckpoint
from converters.rules import EachExpert, Geometry, Origin, Table, Transform
from jaxllm.models.abstract import Parameter
from jaxllm.models.fitting import made_shape, place, refuse_misfits
from jaxllm.models.restoring import restore_weights

WORKERS = 4
"""Tensors prepared at a time. Reading and casting leave Python's lock, so they overlap with the copy to the
device and with each other."""


def load_weights(
    checkpoint: Checkpoint,
    rules: Table,
    parameters: Mapping[str, Parameter],
    geometry: Geometry,
    mesh: Mesh | Mapping[str, Mesh],
    *,
    progress: bool = True,
) -> tuple[Array, ...]:
    """Reads every parameter into the devices of a mesh, each device getting its part.

    Beside what is already on the devices, the host holds at most twice the largest parameter. A
    `ShardedCheckpoint` has parameters already: it is restored straight into place, without the rules.

    Args:
        checkpoint: where the tensors come from.
        rules: the family's table, which says what becomes what.
        parameters: the model's, by path (see `jaxllm.models.split`).
        geometry: sizes that the rules' transforms need.
        mesh: the devices, of all or of each parameter by its path. Those without are left out: other hosts
            have them.
        progress: show a progress bar on stderr.

    Returns:
        The arrays in the order of `parameters`, of those that have a mesh.

    Raises:
        CheckpointError: tensors that are missing, left over or of the wrong shape: all in one message.
    """
    meshes = dict.fromkeys(parameters, mesh) if isinstance(mesh, Mesh) else mesh
    if isinstance(checkpoint, ShardedCheckpoint):
        return restore_weights(checkpoint, parameters, geometry, meshes, progress=progress)
    origins = _assign(checkpoint, rules, parameters, geometry)
    total = sum(parameters[path].nbytes for path in meshes)
    # Preparing a parameter takes up to twice its size: its sources in the new dtype, and what they make.
    budget = max(parameter.nbytes for parameter in parameters.values())
    arrays: list[Array] = []
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    in_flight = 0
    with (
        ThreadPoolExecutor(WORKERS, thread_name_prefix="load") as pool,
        tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        todo = deque(path for path in parameters if path in meshes)
        while todo or waiting:
            fits = todo and in_flight + parameters[todo[0]].nbytes <= budget
            if fits and len(waiting) < WORKERS:
                path = todo.popleft()
                in_flight += parameters[path].nbytes
                waiting.append(
                    (path, pool.submit(_make, checkpoint, origins[path], parameters[path], geometry))
                )
                continue
            path, made = waiting.popleft()
            arrays.append(place(made.result(), parameters[path], meshes[path]))
            del made
            for name in origins[path].sources:
                checkpoint.release(name)
            in_flight -= parameters[path].nbytes
            bar.update(parameters[path].nbytes)
    return tuple(arrays)


def _make(checkpoint: Checkpoint, origin: Origin, parameter: Parameter, geometry: Geometry) -> np.ndarray:
    return origin.transform([checkpoint.read(name, parameter.dtype) for name in origin.sources], geometry)


def _assign(
    checkpoint: Checkpoint, rules: Table, parameters: Mapping[str, Parameter], geometry: Geometry
) -> dict[str, Origin]:
    """Where each parameter comes from, once it is sure that all of them can be made."""

    @cache  # layers are alike: a dozen trials serve them all
    def shape_of(transform: Transform, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...] | None:
        if isinstance(transform, EachExpert):  # tried on one: all together may take gigabytes
            count = len(shapes) // transform.sources
            one = {shape_of(transform.transform, shapes[expert::count]) for expert in range(count)}
            made = one.pop()
            return None if one or made is None else (count, *made)
        return made_shape(lambda arrays: transform(arrays, geometry), shapes)

    assignment = rules.assign(parameters, checkpoint.tensors)
    wrong = []
    for path, origin in assignment.origins.items():
        shapes = tuple(checkpoint.tensors[name].shape for name in origin.sources)
        if shape_of(origin.transform, shapes) != parameters[path].shape:
            sources = (f"{name} {list(shape)}" for name, shape in zip(origin.sources, shapes, strict=True))
            wrong.append(f"{', '.join(sources)} (for {path} {list(parameters[path].shape)})")
    refuse_misfits(
        checkpoint.path, missing=assignment.missing, left_over=assignment.unread, wrong_shape=wrong
    )
    return assignment.origins
