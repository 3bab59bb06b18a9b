"""What is static about a call of the op: what a backend looks at to say whether it serves it."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.devices import platform_of as platform_of
from pallas_kernels.paged_attention.layout import PageGeometry


@dataclass(frozen=True)
class Problem:
    """A kind of layer on a kind of device.

    Attributes:
        platform: as in `jax.Device.platform`: "cpu", "gpu" or "tpu".
        device_kind: as in `jax.Device.device_kind`; empty where it is not known.
        heads: query heads on one device.
        geometry: of the pages on one device; `num_pages` is meaningless.
        dtype: of queries, keys and values.
        sinks: whether there are any.
    """

    platform: str
    device_kind: str
    heads: int
    geometry: PageGeometry
    dtype: jnp.dtype
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


def require_values(problem: Problem) -> None:
    """Refuses pages that hold keys alone, for a backend that reads keys and values.

    Raises:
        NotImplementedError: they do.
    """
    if problem.geometry.shared:
        raise NotImplementedError("pages of keys alone, as in multi-head latent attention: xla serves them")
