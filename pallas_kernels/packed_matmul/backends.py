"""The backends of the product with a packed weight, and the order in which they are tried."""

from pallas_kernels.packed_matmul import cpu, reference
from pallas_kernels.packed_matmul.backend import Backend, PackedMatmulFunction
from pallas_kernels.packed_matmul.problem import Problem
from pallas_kernels.registry import Choice, Registry

ORDER = {"cpu": ("cpu", "reference"), "gpu": ("reference",), "tpu": ("reference",)}
"""For each platform the backends that "auto" tries, best first. Packing is for CPU; elsewhere XLA does it."""

Kernel = str | Backend | PackedMatmulFunction
"""A registered name or "auto", a backend, or a function."""

REGISTRY: Registry[Backend] = Registry("packed_matmul", "packed_matmul_backend", ORDER, Backend)

list_backends = REGISTRY.names


def register_backend(name: str, multiply: PackedMatmulFunction) -> Backend:
    """Makes `backend=name` stand for `multiply`.

    Raises:
        ValueError: the name is taken, or is "auto".
    """
    return REGISTRY.register(Backend(name, multiply))


def choose_backend(kernel: Kernel, problem: Problem) -> Choice[Backend]:
    """The backend that serves the problem.

    Raises:
        ValueError: there is no such backend; the message lists those there are.
        NotImplementedError: it does not serve the problem; the message says what.
    """
    return REGISTRY.choose(kernel, [problem])


def as_backend(kernel: Kernel) -> Backend:
    """The backend of that name; a function becomes one under its own name."""
    return REGISTRY.as_backend(kernel)


for _module in (reference, cpu):
    REGISTRY.register(_module.BACKEND)
