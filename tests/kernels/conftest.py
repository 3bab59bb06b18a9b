"""What tests of several kernels need."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def interpreter(quick_compile: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mosaic GPU's, which runs kernels for Hopper on a CPU, and compiles a lot."""
    import mosaic_gpu_shim
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    mosaic_gpu_shim.install(monkeypatch)
    yield
    reset_gpu_interpret_mode_state()
