"""Logical axes and meshes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.layers.parameter import parameter
from jaxllm.parallel import make_mesh, partition_spec


def test_axes_lie_where_the_table_says() -> None:
    assert partition_spec(("embed", "kv_heads", None)) == PartitionSpec(None, ("expert", "tensor"), None)
    with pytest.raises(ValueError, match="'width' is not one of vocab, heads"):
        partition_spec(("embed", "width"))


def test_mesh_takes_the_first_devices() -> None:
    mesh = make_mesh(4, jax.devices()[2:])
    assert mesh.shape == {"stage": 1, "data": 1, "expert": 1, "tensor": 4}
    assert list(mesh.devices.flat) == jax.devices()[2:6]
    with pytest.raises(ValueError, match="tensor_parallel_size=9: there are only 8 devices"):
        make_mesh(9)
    with pytest.raises(ValueError, match="tensor_parallel_size=2: there is only 1 device "):
        make_mesh(2, jax.devices()[:1])


def test_every_axis_of_a_parameter_has_a_name() -> None:
    with pytest.raises(ValueError, match="each of the 2 axes"):
        parameter((2, 3), ("embed",), jnp.dtype("float32"), nnx.Rngs(0))
