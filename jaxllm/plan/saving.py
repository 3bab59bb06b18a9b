"""Keeps the programs of a plan, so that a host of that kind starts from them without compiling.

The engine finds them where `compilation_cache_dir` names the folder, as it finds those of an earlier start,
if all is the same that they depend on (see `jaxllm.runner.identity`): versions of Python, jax, flax, libtpu
and this package, options, sizes, and the number of pages, which the engine has to be given as it was planned.
That a TPU loads them has not been tried; what cannot be loaded is compiled there, as without them.

Not for GPUs: what is compiled without one was not tuned on it, and their runtime says another version of
itself than their compiler. Not for replicas on several hosts: the engine keeps no programs there either.
"""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jaxllm.engine.loading import keep_whole
from jaxllm.models.base import CausalLM
from jaxllm.plan.layout import Layout, chips_per_host
from jaxllm.plan.step import compiling_anew
from jaxllm.runner.lowering import Lowering


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
    if layout.replica_chips > chips_per_host(layout.target):
        raise NotImplementedError(
            f"--save: a replica of {layout.replica_chips} chips takes several hosts of {chip.name}, "
            "and programs of several hosts are not kept; leave it out"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save: {folder} is no folder")


def save_programs(
    folder: Path, architecture: type[CausalLM], stages: Sequence[Lowering], num_pages: int, *, progress: bool
) -> int:
    """Compiles all programs of all stages and writes them; how many.

    Args:
        num_pages: the null page included.

    Raises:
        CannotIdentifyError: code from outside of this package takes part, or code was changed meanwhile.
        OSError: the folder cannot be written.
    """
    # first, because an engine will look for them with jax's cache switched on
    keeping = [keep_whole(folder, architecture, stage, num_pages) for stage in stages]
    sources = [
        (kept, key, lower)
        for kept, stage in zip(keeping, stages, strict=True)
        for key, lower in stage.programs(num_pages).items()
    ]
    with compiling_anew():
        for kept, key, lower in tqdm(sources, desc="Compiling", unit="program", disable=not progress):
            kept.compile(key, lower())
    written = sum(key in kept for kept, key, _ in sources)
    if written < len(sources):
        raise OSError(f"{folder}: only {written} of {len(sources)} programs could be written; see the log")
    return len(sources)
