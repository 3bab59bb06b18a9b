"""Which attention kernel a model runs on a mesh."""

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.models.base import DecoderConfig
from pallas_kernels.paged_attention import Backend, Kernel, PageGeometry, Problem, choose_backend
from pallas_kernels.paged_attention.problem import platform_of
from pallas_kernels.registry import Choice


def choose_attention(kernel: Kernel, model: DecoderConfig, mesh: Mesh, page_size: int) -> Choice[Backend]:
    """The backend for all of the model's layers, as each device of the mesh sees them.

    Args:
        kernel: a registered name, "auto", a backend, or a function.

    Raises:
        ValueError: there is no such backend; the message lists those there are.
        NotImplementedError: it does not serve one of the model's layers; the message says what.
    """
    return choose_backend(kernel, attention_problems(model, mesh, page_size))


def attention_problems(model: DecoderConfig, mesh: Mesh, page_size: int) -> list[Problem]:
    """One for each kind of attention layer that the model has."""
    device = mesh.devices.flat[0]
    dtype = jnp.dtype(model.dtype)
    size = model.tensor_parallel_size
    geometry = PageGeometry(0, page_size, model.cache_heads // size, model.head_dim, dtype)
    return [
        Problem(
            platform_of(device.platform),
            device.device_kind,
            model.num_heads // size,
            geometry,
            dtype,
            sliding_window=window,
            soft_cap=model.attention.soft_cap,
        )
        for window in dict.fromkeys(model.layer_windows)
    ]
