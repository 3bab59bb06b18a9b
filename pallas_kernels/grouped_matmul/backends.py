"""The backends of the grouped product, and the order in which they are tried."""

from pallas_kernels.grouped_matmul import gpu, reference, tpu, xla
from pallas_kernels.grouped_matmul.backend import Backend, GroupedMatmulFunction
from pallas_kernels.grouped_matmul.problem import Problem
from pallas_kernels.registry import Choice, Registry

ORDER = {
    "cpu": ("xla", "reference"),
    "gpu": ("gpu", "xla", "reference"),
    "tpu": ("xla", "tpu", "reference"),
}
"""For each platform the backends that "auto" tries, best first.

Nothing was timed on a TPU or GPU yet. Compiled for a TPU, `ragged_dot` is a kernel of XLA's own that does the
work of the rows once, and comes first until another was measured to be faster; with axes of 200, no multiples
of 128, it is a dense product with every group. Compiled for a GPU it always is: 32 times the work where a
token goes to 4 of 128 experts.
"""

Kernel = str | Backend | GroupedMatmulFunction
"""A registered name or "auto", a backend, or a function."""

REGISTRY: Registry[Backend] = Registry("grouped_matmul", "grouped_matmul_backend", ORDER, Backend)

list_backends = REGISTRY.names


def register_backend(name: str, multiply: GroupedMatmulFunction) -> Backend:
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


for _module in (reference, xla, tpu, gpu):
    REGISTRY.register(_module.BACKEND)
