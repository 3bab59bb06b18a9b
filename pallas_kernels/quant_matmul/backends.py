"""The backends of the product with quantized weights, and the order in which they are tried."""

from pallas_kernels.quant_matmul import gpu, reference, tpu, xla
from pallas_kernels.quant_matmul.backend import Backend, QuantMatmulFunction
from pallas_kernels.quant_matmul.problem import Problem
from pallas_kernels.registry import Choice, Registry

ORDER = {
    "cpu": ("xla", "reference"),
    "gpu": ("gpu", "xla", "reference"),
    "tpu": ("tpu", "xla", "reference"),
}
"""For each platform the backends that "auto" tries, best first.

Nothing was timed on a TPU or GPU yet. The kernels come first because they read the stored values once, where
XLA, as compiled for v5e, writes int4 and weights with blocks of scales to memory in float32, and as compiled
for an H100 every weight in bfloat16.
"""

Kernel = str | Backend | QuantMatmulFunction
"""A registered name or "auto", a backend, or a function."""

REGISTRY: Registry[Backend] = Registry("quant_matmul", "quant_matmul_backend", ORDER, Backend)

list_backends = REGISTRY.names


def register_backend(name: str, multiply: QuantMatmulFunction) -> Backend:
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
