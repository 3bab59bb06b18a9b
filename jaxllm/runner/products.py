"""What multiplies with a model's weights: XLA, or a kernel for weights that are packed for it."""

import logging
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.models.base import DecoderConfig
from pallas_kernels.packed_matmul import Backend, Problem, as_backend, list_backends

logger = logging.getLogger(__name__)

XLA = "xla"
PACKED_ON_CPU = "cpu"
"""The kernel in C++: SmolLM2-135M in bfloat16 on 2 cores gave 636 instead of 451 tokens/s for 32 requests,
and 54 instead of 30 for one."""


@dataclass(frozen=True)
class Products:
    """What multiplies with weights.

    Attributes:
        backend: packs and multiplies; None: XLA does, with weights as they are.
        reason: why "auto" did not take the kernel that it would have taken; empty where it did.
    """

    backend: Backend | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Of the backend."""
        return XLA if self.backend is None else self.backend.name

    def __str__(self) -> str:
        return f"{self.name} (not {PACKED_ON_CPU}: {self.reason})" if self.reason else self.name


def check_products(name: str) -> None:
    """Refuses a name that stands for nothing.

    Raises:
        ValueError: there is no such backend; the message lists those there are.
    """
    names = ["auto", XLA, *list_backends()]
    if name not in names:
        raise ValueError(f"matmul_backend={name!r}: there is no such backend; there are {', '.join(names)}")


def prepare_products(name: str, mesh: Mesh) -> None:
    """Starts to build what takes time, if it may be needed; returns at once."""
    if name not in ("auto", XLA):
        as_backend(name).prepare()
    elif name == "auto" and mesh.devices.flat[0].platform == "cpu" and mesh.size == 1:
        as_backend(PACKED_ON_CPU).prepare()


def choose_products(name: str, model: DecoderConfig, mesh: Mesh) -> Products:
    """What multiplies with the model's weights.

    Args:
        name: "auto", "xla", or that of a backend of `pallas_kernels.packed_matmul`.

    Raises:
        NotImplementedError: the backend that was asked for does not serve the model; the message says why.
    """
    if name == XLA:
        return Products()
    backend = as_backend(PACKED_ON_CPU if name == "auto" else name)
    try:
        _require(backend, model, mesh)
    except NotImplementedError as error:
        if name == "auto":
            found = Products(reason=str(error))
            logger.info("products: %s", found)
            return found
        raise NotImplementedError(
            f"matmul_backend={name!r} does not serve this model: {error}; leave it at 'auto'"
        ) from error
    return Products(backend)


def _require(backend: Backend, model: DecoderConfig, mesh: Mesh) -> None:
    if mesh.size > 1:
        raise NotImplementedError(f"{mesh.size} devices: packed weights are not cut over devices")
    device = mesh.devices.flat[0]
    dtype = jnp.dtype(model.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"weights of {dtype}: packed are float32, bfloat16")
    for out_dtype in (dtype, jnp.dtype(jnp.float32)):
        backend.require(
            Problem(
                device.platform,
                device.device_kind,
                rows=1,
                inputs=model.hidden_size,
                outputs=model.hidden_size,
                dtype=dtype,
                out_dtype=out_dtype,
            )
        )
