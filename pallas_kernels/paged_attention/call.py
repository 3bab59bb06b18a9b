"""Which backend serves a call of the op, judged by the arrays that it is given."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.devices import current_device
from pallas_kernels.paged_attention.backend import Backend
from pallas_kernels.paged_attention.backends import ORDER, REGISTRY
from pallas_kernels.paged_attention.layout import PageGeometry
from pallas_kernels.paged_attention.problem import Problem


@dataclass(frozen=True)
class Call:
    """What is static about a call, read from its arguments."""

    q: Array
    k: Array
    pages: Array
    sliding_window: int | None
    soft_cap: float | None
    sinks: bool

    def choose(self) -> Backend:
        """The first backend in the order of jax's default platform whose packing the pages have.

        Raises:
            ValueError: the pages are in no backend's packing.
            NotImplementedError: none of those whose packing it is serves the call.
        """
        platform, _ = current_device()
        if platform not in ORDER:
            raise ValueError(f"no order of backends for {platform!r}; name the backend")
        order = ORDER[platform]
        fitting = [name for name in order if self.geometry(REGISTRY.get(name)) is not None]
        if not fitting:
            raise ValueError(f"pages{list(self.pages.shape)}: the packing of none of {', '.join(order)}")
        problem = self.problem(REGISTRY.get(fitting[0]))
        return REGISTRY.choose("auto", [problem], among=fitting).backend

    def require(self, backend: Backend) -> Backend:
        """The backend, if it serves the call.

        Raises:
            ValueError: the pages are not in its packing.
            NotImplementedError: it does not serve the call; the message says what.
        """
        backend.require(self.problem(backend))
        return backend

    def problem(self, backend: Backend) -> Problem:
        """The call with pages in that backend's packing.

        Raises:
            ValueError: they are not.
        """
        geometry = self.geometry(backend)
        if geometry is None:
            kv_heads, head_dim = self.k.shape[1:]
            raise ValueError(
                f"pages{list(self.pages.shape)}: not the packing of backend {backend.name!r} for "
                f"{kv_heads} kv heads of {head_dim}; make them with its layout"
            )
        platform, device_kind = current_device()
        return Problem(
            platform=platform,
            device_kind=device_kind,
            heads=self.q.shape[1],
            geometry=geometry,
            dtype=jnp.dtype(self.q.dtype),
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
        )

    def geometry(self, backend: Backend) -> PageGeometry | None:
        """What the pages hold, if they are in the backend's packing."""
        return backend.layout.read(self.pages, self.k.shape[1], self.k.shape[2])


def check_values(geometry: PageGeometry, k: Array, v: Array) -> None:
    """Whether values have the shape of keys, or in pages of keys alone that of their first dimensions.

    Raises:
        ValueError: they do not.
    """
    longest = k.shape[2]
    if v.shape[:2] != k.shape[:2] or not (1 if geometry.shared else longest) <= v.shape[2] <= longest:
        last = f"1 to {longest}" if geometry.shared else longest
        raise ValueError(
            f"v{list(v.shape)}: must be [{k.shape[0]}, {k.shape[1]}, {last}] to go with k and pages"
        )
