"""Weights from a checkpoint of the engine's own parameters into the shards of a mesh."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm.auto import tqdm

from converters.checkpoint import ShardedCheckpoint
from converters.rules import Geometry
from jaxllm.models.abstract import Parameter
from jaxllm.models.fitting import made_shape, place, refuse_misfits
from jaxllm.parallel import Axes


def restore_weights(
    checkpoint: ShardedCheckpoint,
    parameters: Mapping[str, Parameter],
    geometry: Geometry,
    meshes: Mapping[str, Mesh],
    *,
    progress: bool = True,
) -> tuple[Array, ...]:
    """Restores every parameter; each device reads its part from disk.

    What is stored is what one device would hold. Where the mesh needs copies of key-value heads or a padded
    vocabulary, the host reads the array, one at a time, and spreads it. The arguments are `load_weights`'s,
    with a mesh for each parameter.

    Raises:
        CheckpointError: arrays that are missing, left over or of the wrong shape, all in one message.
    """
    stored = {path: info.shape for path, info in checkpoint.tensors.items()}
    refuse_misfits(
        checkpoint.path,
        missing=[path for path in parameters if path not in stored],
        left_over=[path for path in stored if path not in parameters],
        wrong_shape=[
            f"{path} {list(stored[path])} (wanted: {list(parameter.shape)})"
            for path, parameter in parameters.items()
            if path in stored and _spread_shape(stored[path], parameter.axes, geometry) != parameter.shape
        ],
    )
    direct = {path: parameter for path, parameter in parameters.items() if stored[path] == parameter.shape}
    restored: dict[str, Array] = {}
    total = sum(parameter.nbytes for parameter in parameters.values())
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for batch in _batches(direct):
            wanted = {
                path: jax.ShapeDtypeStruct(
                    parameter.shape, parameter.dtype, sharding=parameter.sharding(meshes[path])
                )
                for path, parameter in batch.items()
            }
            for path, array in checkpoint.restore(wanted).items():
                restored[path] = batch[path].keep(array, meshes[path])
            bar.update(sum(parameter.nbytes for parameter in batch.values()))
        for path, parameter in parameters.items():
            if path not in direct:
                array = spread(checkpoint.read(path, parameter.dtype), parameter.axes, geometry)
                restored[path] = place(array, parameter, meshes[path])
                bar.update(parameter.nbytes)
    return tuple(restored[path] for path in parameters)


def _batches(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Parameter]]:
    """Parts of at most the largest parameter's size: what is read and what is made are in memory together."""
    budget = max((parameter.nbytes for parameter in parameters.values()), default=0)
    batch: dict[str, Parameter] = {}
    for path, parameter in parameters.items():
        if batch and sum(one.nbytes for one in batch.values()) + parameter.nbytes > budget:
            yield batch
            batch = {}
        batch[path] = parameter
    if batch:
        yield batch


def spread(array: np.ndarray, axes: Axes, geometry: Geometry) -> np.ndarray:
    """From the form that one device would hold to the one that a mesh's devices share."""
    if "vocab" in axes:
        extra = geometry.padded_vocab_size - geometry.vocab_size
        return np.pad(array, [(0, extra if axis == "vocab" else 0) for axis in axes]) if extra else array
    if "kv_heads" not in axes or geometry.kv_copies == 1:
        return array
    heads = axes.index("kv_heads")
    if len(axes) - heads < 3:
        return np.repeat(array, geometry.kv_copies, axis=heads)
    # Fused: each key-value head comes with its queries, which its copies share out.
    queries, kv = np.split(array, [-2], axis=heads + 1)
    kv = np.repeat(kv, geometry.kv_copies, axis=heads)
    queries = queries.reshape(*kv.shape[: heads + 1], geometry.group, geometry.head_dim)
    return np.concatenate([queries, kv], axis=heads + 1)


def _spread_shape(shape: tuple[int, ...], axes: Axes, geometry: Geometry) -> tuple[int, ...] | None:
    if len(shape) != len(axes):
        return None
    return made_shape(lambda arrays: spread(arrays[0], axes, geometry), [shape])
