"""The ops of the library: each folder that has backends is one, and all have the same form."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from pallas_kernels.bench import Options, Workload
from pallas_kernels.registry import Registry
from pallas_kernels.report import Report


@dataclass(frozen=True)
class Op:
    """One op, as the command line sees it.

    Attributes:
        check: runs cases on a backend: `check(name, cases=..., interpret=...)`.
        cases: the corners that every backend is held to.
        workloads: what is timed, for a platform and what the user asked for.
    """

    name: str
    registry: Registry[Any]
    check: Callable[..., Report]
    cases: Mapping[str, Any]
    workloads: Callable[[str, str, Options], list[Workload]]


def list_ops() -> list[str]:
    """Names of the ops."""
    folders = resources.files("pallas_kernels").iterdir()
    return sorted(folder.name for folder in folders if folder.joinpath("backends.py").is_file())


def get_op(name: str) -> Op:
    """The op of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in list_ops():
        raise ValueError(f"op {name!r}: there is no such op; there are {', '.join(list_ops())}")
    modules = {
        part: importlib.import_module(f"pallas_kernels.{name}.{part}")
        for part in ("backends", "check", "cases", "bench")
    }
    return Op(
        name=name,
        registry=modules["backends"].REGISTRY,
        check=modules["check"].check,
        cases=modules["cases"].CORNERS,
        workloads=modules["bench"].workloads,
    )


def runs_on(op: Op, backend: str, platform: str) -> bool:
    """Whether a backend is one for the platform: in its order, or in none, as one's own kernels are."""
    order = op.registry.order
    return backend in order.get(platform, ()) or not any(backend in names for names in order.values())
