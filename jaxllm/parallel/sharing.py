"""Functions over the devices of a mesh that layers share."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxllm.parallel.axes import DATA_GROUPS


def share_over(
    mesh: AbstractMesh, function: Callable[..., Any], *, in_specs: Any, out_specs: Any, check_vma: bool = True
) -> Callable[..., Any]:
    """`jax.shard_map` of a function over all axes, for layers that are alike to call: it is traced once.

    The program has it once, too, unless there are data groups, whose programs run under another `shard_map`.
    There XLA for TPU aborts where two layers call one function and a group has several devices (libtpu
    0.0.42.1, `Check failed: target.IsManualSubgroup() == sharding().IsManualSubgroup()`), so each call is a
    copy.
    """
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    return jax.jit(mapped, inline=mesh.shape[DATA_GROUPS] > 1)
