"""What a compiled program depends on, as text: two processes with equal texts may share their programs.

The text is made without tracing, so it must name everything that tracing reads: the sizes and options, which
are frozen dataclasses, and the code, which is a hash of this package's files. Code from anywhere else (a
logits processor, an attention kernel, a model of one's own) has no such hash, and is refused.
"""

import dataclasses
import enum
import functools
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxllm.models.base import CausalLM
from jaxllm.runner.lowering import Lowering
from pallas_kernels import native

PACKAGES = ("converters", "jaxllm", "pallas_kernels")
"""Whose code is hashed."""
CODE = frozenset((".py", ".cc", ".h", ".json"))
DISTRIBUTIONS = ("flax", "jax", "jaxlib", "ml_dtypes", "numpy")
ENVIRONMENT = ("XLA_", "LIBTPU_", "TPU_MEGACORE", "CUDA_", "NVIDIA_")
"""Beginnings of variables that XLA and its runtimes read by themselves; jax's own are in its config.
Others of TPUs say which machine it is, which the devices say, too."""
HARMLESS = ("jax_compilation_cache", "jax_persistent_cache", "jax_log", "jax_logging", "jax_platforms")
"""Beginnings of options of jax that leave programs as they are."""


class CannotIdentifyError(Exception):
    """Something that a program may depend on cannot be described; the message says what."""


def identify(lowering: Lowering, architecture: type[CausalLM], num_pages: int) -> str:
    """The text for the programs of a lowering, with pools of that many pages.

    To be called in a thread like those that trace: options of jax can be set for a thread alone.

    Raises:
        CannotIdentifyError: code from outside of this package takes part, or code was changed meanwhile.
    """
    if jax.process_count() > 1:
        raise CannotIdentifyError("there are several processes")
    backend, products = lowering.backend, lowering.products
    parts = {
        "architecture": architecture,
        "model": lowering.model,
        "weights": lowering.params,
        "layout": lowering.layout,
        "stage": lowering.stage,
        "sizes": lowering.sizes,
        "pages": num_pages,
        "sampler": lowering.sampler,
        "attention": (backend.name, backend.attend, backend.layout),
        "products": products and (products.name, products.multiply),
        "mesh": lowering.mesh,
        "machine": _machine(lowering.mesh),
        "versions": {name: version(name) for name in DISTRIBUTIONS} | {"python": sys.version},
        "options": {k: str(v) for k, v in jax.config.values.items() if not k.startswith(HARMLESS)},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
        "code": code_hash(),
    }
    return "\n".join(f"{name}: {describe(part)}" for name, part in parts.items())


def _machine(mesh: Mesh) -> Mapping[str, Any]:
    """Of chips all that their client says, whether they are here or only compiled for; of a CPU its own."""
    device = mesh.devices.flat[0]
    found = {
        "device": (device.platform, device.device_kind, device.client.device_count()),
        "runtime": device.client.platform_version,
    }
    if device.platform != "cpu":
        return found
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return found | {
        "cores": (os.cpu_count(), usable),
        "processor": native.processor(),
        "native": native.built_keys(),
    }


def describe(value: Any) -> str:
    """A value as text, the same in every process, and another for any other value.

    Raises:
        CannotIdentifyError: it is, or holds, something that is not plain data or this package's code.
    """
    match value:
        case None | bool() | int() | float() | str() | bytes():
            return repr(value)
        case enum.Enum():
            return f"{describe(type(value))}.{value.name}"
        case tuple() | list():
            return f"[{', '.join(map(describe, value))}]"
        case frozenset():
            return f"{{{', '.join(sorted(map(describe, value)))}}}"
        case Mapping():
            return f"{{{', '.join(sorted(f'{describe(k)}: {describe(v)}' for k, v in value.items()))}}}"
        case np.dtype():
            return str(value)
        case np.ndarray():
            return f"{value.dtype}{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        case jax.ShapeDtypeStruct():
            return f"{value.dtype}{value.shape} {describe(value.sharding)}"
        case Mesh():
            return f"{value.axis_names} {value.devices.shape} {[d.id for d in value.devices.flat]}"
        case Sharding():
            return f"{value} {value.memory_kind}"
        case functools.partial():
            return describe((value.func, value.args, value.keywords))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{describe(type(value))}{describe(fields)}"
    return _describe_code(value)


def _describe_code(value: Any) -> str:
    """A class or function of this package, by its name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None or name is None:
        raise CannotIdentifyError(f"{value!r} is not plain data")
    if module.partition(".")[0] not in PACKAGES:
        raise CannotIdentifyError(f"{module}.{name} is not part of jaxllm")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise CannotIdentifyError(f"{module}.{name} is not there under its name")
    return f"{module}.{name}"


def code_hash() -> str:
    """A hash of all files of code.

    Raises:
        CannotIdentifyError: they cannot be read, or have been changed since this process began.
    """
    found, begin = hashlib.sha256(), _process_begin()
    for package in PACKAGES:
        files = package_files(package)
        if not files:
            raise CannotIdentifyError(f"the code of {package} is not in files")
        for file, folder in files:
            if file.stat().st_mtime > begin:
                raise CannotIdentifyError(f"{file} has been changed since this process began")
            content = file.read_bytes()
            found.update(f"{package} {file.relative_to(folder)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def package_files(package: str) -> list[tuple[Path, Path]]:
    """A package's files of code, each with the folder that the package is in."""
    spec = find_spec(package)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = sorted((file, folder) for folder in folders for file in folder.rglob("*"))
    return [(file, folder) for file, folder in files if file.suffix in CODE]


def _process_begin() -> float:
    """When this process began, in seconds of `time.time`.

    Raises:
        CannotIdentifyError: the system does not tell.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # proc_pid_stat(5): the 22nd of all, in ticks since the machine was booted
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError) as error:
        raise CannotIdentifyError(f"the system does not say when this process began ({error})") from error
    return time.time() - age
