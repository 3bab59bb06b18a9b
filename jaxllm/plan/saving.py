"""Keeps the programs of a plan, so that a host of that kind starts from them without compiling.

The engine finds them where `compilation_cache_dir` names the folder, as it finds those of an earlier start,
if all is the same that they depend on (see `jaxllm.runner.identity`): versions of Python, jax, flax, libtpu
and this package, options, sizes, and the number of pages, which the engine has to be given as it was planned.
That a TPU loads them has not been tried; what cannot be loaded is compiled there, as without them.

Not for GPUs: what is compiled without one was not tuned on it, and their runtime says another version of
itself than their compiler. Not for replicas on several hosts: the engine keeps no programs there either.
"""

from pathlib import Path

from tqdm import tqdm

from jaxllm.engine.loading import keep_whole
from jaxllm.models.base import CausalLM
from jaxllm.plan.layout import Layout
from jaxllm.plan.step import compiling_anew
from jaxllm.runner.lowering import Lowering

CHIPS_PER_HOST = {"v5e": 8, "v6e": 8, "v5p": 4}
"""At most, of slices on one host (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""


def check_saving(folder: Path, layout: Layout) -> None:
    """Before anything is compiled: whether programs of this layout can be kept.

    Raises:
        NotImplementedError: they cannot; the message says why.
        ValueError: the folder is something else.
    """
    chip = layout.target.chip
    if chip.platform != "tpu":
        raise NotImplementedError(
            f"--save: programs for {chip.name} are not kept, as they were not tuned on it; leave it out, and "
            "the first start there keeps its own"
        )
    if layout.replica_chips > CHIPS_PER_HOST[chip.name]:
        raise NotImplementedError(
            f"--save: a replica of {layout.replica_chips} chips takes several hosts of {chip.name}, "
            "and programs of several hosts are not kept; leave it out"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save: {folder} is no folder")


def save_programs(
    folder: Path, architecture: type[CausalLM], lowering: Lowering, num_pages: int, *, progress: bool
) -> int:
    """Compiles all programs and writes them; how many.

    Args:
        num_pages: the null page included.

    Raises:
        CannotIdentifyError: code from outside of this package takes part, or code was changed meanwhile.
        OSError: the folder cannot be written.
    """
    # first, because an engine will look for them with jax's cache switched on
    kept, sources = keep_whole(folder, architecture, lowering, num_pages), lowering.programs(num_pages)
    with compiling_anew():
        for key in tqdm(sources, desc="Compiling", unit="program", disable=not progress):
            kept.compile(key, sources[key]())
    written = sum(key in kept for key in sources)
    if written < len(sources):
        raise OSError(f"{folder}: only {written} of {len(sources)} programs could be written; see the log")
    return len(sources)
