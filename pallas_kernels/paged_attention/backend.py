"""What a backend of paged attention is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Array

from pallas_kernels.paged_attention.batch import RaggedBatch
from pallas_kernels.paged_attention.layout import INTERLEAVED, PageLayout
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.registry import do_nothing, serves_all
from pallas_kernels.tuning import Tunable


@runtime_checkable
class AttentionFunction(Protocol):
    """What a backend implements: `paged_attention` less its `backend` argument."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        pages: Array,
        batch: RaggedBatch,
        /,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        sinks: Array | None,
        k_scale: Array | None,
        v_scale: Array | None,
    ) -> tuple[Array, Array]: ...


@dataclass(frozen=True)
class Backend:
    """A way to compute the op, and the packing of pages that it works on.

    Attributes:
        platform: the only one that it serves; None: any.
        require: raises NotImplementedError, with the reason, for a problem that is not served.
        prepare: starts in the background what `require` will wait for.
        interpreted: the same kernel on the CPU, where `attend` needs an accelerator.
        tunable: what `python -m pallas_kernels tune` may choose; None: nothing.
    """

    name: str
    attend: AttentionFunction
    layout: PageLayout = INTERLEAVED
    platform: str | None = None
    require: Callable[[Problem], None] = serves_all
    interpreted: AttentionFunction | None = None
    prepare: Callable[[], None] = do_nothing
    tunable: Tunable | None = None
