"""What tests of several kernels need."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mosaic GPU's, which runs kernels for Hopper on a CPU."""
    import mosaic_gpu_shim
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    mosaic_gpu_shim.install(monkeypatch)
    jax.config.update("jax_disable_most_optimizations", True)  # the interpreter compiles a lot
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    reset_gpu_interpret_mode_state()
