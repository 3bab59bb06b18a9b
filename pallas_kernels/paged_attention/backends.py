"""The backends of paged attention, and the order in which they are tried."""

from collections.abc import Sequence

from pallas_kernels.paged_attention import cpu, gpu, reference, tpu, xla
from pallas_kernels.paged_attention.backend import AttentionFunction, Backend
from pallas_kernels.paged_attention.layout import INTERLEAVED, PageLayout
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.registry import Choice, Registry

ORDER = {
    "cpu": ("cpu", "xla", "reference"),
    "gpu": ("gpu", "xla", "reference"),
    "tpu": ("tpu", "xla", "reference"),
}
"""For each platform the backends that "auto" tries, best first."""

Kernel = str | Backend | AttentionFunction
"""A registered name or "auto", a backend, or a function on `INTERLEAVED` pages."""

REGISTRY: Registry[Backend] = Registry("paged_attention", "attention_backend", ORDER, Backend)

list_backends = REGISTRY.names


def register_backend(name: str, attend: AttentionFunction, layout: PageLayout = INTERLEAVED) -> Backend:
    """Makes `backend=name` stand for `attend`, on pages packed as `layout` says.

    Raises:
        ValueError: the name is taken, or is "auto".
    """
    return REGISTRY.register(Backend(name, attend, layout))


def choose_backend(kernel: Kernel, problems: Sequence[Problem]) -> Choice[Backend]:
    """The backend that serves layers of these kinds.

    Args:
        kernel: a registered name, "auto" for the first in `ORDER` that serves all of `problems`, a backend,
            or a function on pages in the `INTERLEAVED` packing.

    Raises:
        ValueError: there is no such backend; the message lists those there are.
        NotImplementedError: it does not serve one of the problems; the message says what.
    """
    return REGISTRY.choose(kernel, problems)


def as_backend(kernel: Kernel) -> Backend:
    """The backend of that name; a function becomes one under its own name, on `INTERLEAVED` pages."""
    return REGISTRY.as_backend(kernel)


for _module in (cpu, gpu, reference, tpu, xla):
    REGISTRY.register(_module.BACKEND)
