"""What every test runs under: eight virtual CPU devices, a cache of compiled programs, fixed histories."""

import os
from collections.abc import Iterator
from pathlib import Path

# jax reads these when it is first imported, which no test may do before this file has run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# A test that would need the network fails at once, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def no_jax_cache() -> Iterator[None]:
    """Without jax's caches on disk and in memory: what comes from there cannot be kept whole."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Programs compiled in two thirds of the time, which run slower: for modules that test what lies where.

    What a model computes is tested elsewhere, with the programs that users get. An interpreter of kernels is
    none of those.
    """
    import jax

    before: bool = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
