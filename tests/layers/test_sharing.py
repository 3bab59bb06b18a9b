"""Functions that layers share."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxllm.parallel import DATA_GROUPS, make_mesh, share_over


@pytest.mark.parametrize(("groups", "calls"), [(1, 2), (2, 0)])
def test_layers_call_one_function_but_under_data_groups(groups: int, calls: int) -> None:
    """Where each call is a copy, since XLA for TPU cannot have it otherwise."""
    mesh, traced = make_mesh(2, data_parallel_size=groups), []
    spec = PartitionSpec(None, "tensor")

    def double(x: Array) -> Array:
        traced.append(x)
        return 2 * x

    def layers(x: Array) -> Array:
        shared = share_over(jax.sharding.get_abstract_mesh(), double, in_specs=spec, out_specs=spec)
        return shared(shared(x) + 1)

    with jax.set_mesh(mesh):
        own = PartitionSpec(DATA_GROUPS)
        cut = jax.shard_map(layers, in_specs=own, out_specs=own, axis_names={DATA_GROUPS}, check_vma=False)
        x = jnp.arange(8.0).reshape(2, 4)
        lowered = jax.jit(layers if groups == 1 else cut).lower(x)
        assert lowered.as_text().count("call @double") == calls
        assert len(traced) == 1
        assert (lowered.compile()(x) == 4 * x + 2).all()
