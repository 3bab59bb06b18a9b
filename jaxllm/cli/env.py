"""`jaxllm env`: what one pastes into a bug report."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "jaxllm", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "orbax-checkpoint",
    "numpy", "ml_dtypes", "transformers", "tokenizers", "llguidance", "huggingface_hub", "gguf",
)  # fmt: skip
VARIABLES = ("CUDA_", "HF_", "JAX_", "LIBTPU_", "NVIDIA_", "TPU_", "XLA_")
SECRETS = ("KEY", "PASSWORD", "SECRET", "TOKEN")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report."""
    sections = report()
    if arguments.json:
        print(json.dumps(sections, indent=2))
        return 0
    for title, values in sections.items():
        print(title)
        width = max(map(len, values), default=0)
        for name, value in values.items():
            print(f"  {name:{width}}  {', '.join(value) if isinstance(value, list) else value}")
    return 0


def report() -> dict[str, dict[str, Any]]:
    """Versions, machine, devices, caches, what is registered, kernels, and variables that others read."""
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "executable": sys.executable},
        "devices": _devices(),
        "caches": _caches(),
        "registered": _registered(),
        "attention": _attention(),
        "products": _products(),
        "environment": _environment(os.environ),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _devices() -> dict[str, str]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # a broken driver is just what a bug report is about
        return {"error": str(error)}
    return {str(device): f"{device.device_kind}{_memory(device)}" for device in devices}


def _memory(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f", {limit / 2**30:.1f} GiB" if limit else ""


def _caches() -> dict[str, str]:
    import platformdirs
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = {"jaxllm": Path(platformdirs.user_cache_dir("jaxllm")), "hugging face": Path(HF_HUB_CACHE)}
    return {name: f"{folder}{'' if folder.is_dir() else ' (not there)'}" for name, folder in folders.items()}


def _registered() -> dict[str, list[str]]:
    from jaxllm.models.registry import ModelRegistry
    from jaxllm.sampling.processors import registered_logits_processors
    from pallas_kernels.paged_attention import list_backends

    return {
        "architectures": ModelRegistry.get_supported_archs(),
        "attention backends": list_backends(),
        "logits processors": [processor.name for processor in registered_logits_processors()],
    }


def _attention() -> dict[str, str]:
    """The kernels that "auto" tries on the device that is there, in that order, and what each says to a usual
    model: its own layers may still be another matter."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import PageGeometry, Problem
    from pallas_kernels.paged_attention.backends import ORDER, REGISTRY
    from pallas_kernels.paged_attention.problem import platform_of

    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        return {"error": str(error)}
    platform, dtype = platform_of(device.platform), jnp.dtype(jnp.bfloat16)
    usual = Problem(platform, device.device_kind, 32, PageGeometry(0, 16, 8, 128, dtype), dtype)
    found: dict[str, str] = {}
    for name in ORDER.get(platform, ()):
        try:
            REGISTRY.get(name).require(usual)
        except NotImplementedError as error:
            found[name] = f"does not serve: {error}"
        else:
            first = not any(verdict.startswith("serves") for verdict in found.values())
            found[name] = "serves, and is taken" if first else "serves"
    return found


def _products() -> dict[str, str]:
    """What "auto" multiplies a bfloat16 model's weights with on one device of those that are there."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.packed_matmul import Problem, as_backend

    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        return {"error": str(error)}
    dtype = jnp.dtype(jnp.bfloat16)
    try:
        as_backend("cpu").require(Problem(device.platform, device.device_kind, 1, 64, 64, dtype, dtype))
    except NotImplementedError as error:
        return {"cpu": f"does not serve: {error}", "xla": "is taken"}
    return {"cpu": "serves packed weights, and is taken"}


def _environment(variables: Any) -> dict[str, str]:
    """The variables that matter, with those that may hold secrets only named."""
    return {
        name: "(set)" if any(word in name for word in SECRETS) else value
        for name, value in sorted(variables.items())
        if name.startswith(VARIABLES)
    }
