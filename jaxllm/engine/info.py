"""What an engine says of itself: sizes, figures, and what is where."""

from typing import TYPE_CHECKING

import jax

from converters.tokenizer import full_tokenizer
from jaxllm.cache.pages import Occupancy
from jaxllm.engine.figures import engine_figures, replica_figures
from jaxllm.engine.loading import EngineParts
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.vocabulary import Vocabulary
from jaxllm.parallel.hosts import HostGroup
from jaxllm.runner.products import Products
from jaxllm.runner.programs import wait_for_all
from jaxllm.runner.stage import StageRunner
from jaxllm.sampling import SamplingParams
from pallas_kernels.paged_attention import Backend
from pallas_kernels.registry import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EngineInfo:
    """The part of `Engine` that changes nothing."""

    def __init__(self, parts: EngineParts) -> None:
        self.config = parts.config
        self._parts = parts
        self._core = parts.core
        self._cores = parts.cores
        self._inputs = parts.inputs

    @property
    def default_params(self) -> SamplingParams:
        """What requests without parameters get: what the model's generation_config.json suggests."""
        return self._inputs.default_params

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and output."""
        return self._inputs.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Most requests that run at a time, on all replicas together."""
        return sum(core.scheduler.limits.max_num_seqs for core in self._cores)

    @property
    def num_serving(self) -> int:
        """Replicas that have not failed, or have started over since."""
        return sum(core.failure is None for core in self._cores)

    @property
    def metrics(self) -> Metrics:
        """What is counted and timed, of several replicas until now; `get_metrics` gives it as numbers."""
        return self._core.metrics

    @property
    def vocabulary(self) -> Vocabulary | None:
        """How tokens become text; None without a tokenizer."""
        return self._core.vocabulary

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer.

        Raises:
            ValueError: the engine was made without one.
        """
        if self._parts.tokenizer is None:
            raise ValueError("this engine has no tokenizer: it was made with skip_tokenizer_init=True")
        return full_tokenizer(self._parts.tokenizer)

    def get_metrics(self) -> dict[str, float]:
        """Counts and times so far (see `Metrics.snapshot`), the programs, and the attention kernel.

        Of all `programs`, `programs_pending` are still being compiled, `programs_loaded` had been kept by an
        earlier process, and `programs_compiled_late_total` were compiled while a request waited for them;
        `compile_seconds` is how long it took until the last one was there.
        `attention_backend_info{...}`, with labels as Prometheus writes them, is 1 for the kernel that runs,
        and 0, with the reason, for each that would have been tried before it. `matmul_backend_info{...}` says
        what multiplies with weights, `bucket_steps_total{tokens=...}` how often programs of which size ran.
        With `enable_eplb`, `expert_rebalances_total` says how often experts were placed anew,
        `expert_imbalance` what the fullest device has had since then, by the tokens of the mean one, and
        `expert_imbalance_before` what it had before.
        """
        return engine_figures(self._parts)

    def get_replica_metrics(self) -> dict[str, dict[str, float]]:
        """The same counts, times and programs for each replica, by its number from "0" on.

        Where there are several, "front" has what counts for none of them: requests that wait for a replica,
        and those that ended there.
        """
        return replica_figures(self._parts)

    @property
    def replica_metrics(self) -> tuple[Metrics, ...]:
        """What each replica has counted and timed."""
        return tuple(core.metrics for core in self._cores)

    def page_occupancy(self, most_runs: int) -> Occupancy:
        """How many of the cache's pages are used and cached, by where they lie; any thread may ask.

        The pages of several replicas, or data groups, follow one another.

        Args:
            most_runs: runs of neighbouring pages to tell apart.
        """
        return Occupancy.of(
            (cache.pool for core in self._cores for cache in core.scheduler.caches), most_runs
        )

    def wait_for_programs(self, timeout: float | None = None) -> bool:
        """Waits until no program is being compiled any more; False if that takes more than `timeout` seconds.

        Requests need not wait for it: until then a step may run in a program that was made for a larger one.

        Raises:
            Exception: what compiling a program raised.
        """
        return wait_for_all([core.runner.programs for core in self._cores], timeout)

    @property
    def attention_backend(self) -> Choice[Backend]:
        """The attention kernel that runs, and why those tried before it do not."""
        return self._parts.attention

    @property
    def matmul_backend(self) -> Products:
        """What multiplies with the weights, and why it is not a kernel for packed ones."""
        return self._parts.products

    def get_weights(self) -> list[dict[str, jax.Array]]:
        """For each stage of the model, mostly one, its weights by name as they lie on its devices.

        The stages of several replicas follow one another, here and in `get_pages`. Of stages on several hosts
        those on host 0 are given.

        Raises:
            RuntimeError: the engine sleeps.
        """
        names = [part for source in self._parts.weight_sources for part in source.parts]
        return [
            dict(zip(part, stage.arrays[0], strict=True))
            for part, stage in zip(names, self._stages, strict=True)
        ]

    def get_pages(self) -> list[tuple[jax.Array, ...]]:
        """For each stage its pools of pages, packed as the attention kernel likes them. A step takes them.

        Raises:
            RuntimeError: the engine sleeps.
        """
        return [stage.arrays[1] for stage in self._stages]

    @property
    def _stages(self) -> list[StageRunner]:
        return [stage for core in self._cores for stage in core.runner.stages]

    def get_page_tables(self) -> dict[str, list[list[int]]]:
        """For each running request its pages, one list for each group of layers.

        Each replica, and each data group, numbers its own pages.
        """
        running = [request for core in self._cores for request in core.scheduler.running]
        return {r.request_id: [list(table) for table in r.tables.groups] for r in running if r.tables}

    @property
    def hosts(self) -> HostGroup | None:
        """The hosts that it runs on, where they are several."""
        return self._parts.hosts

    @property
    def failure(self) -> Exception | None:
        """Why nothing can run any more, if that is so."""
        return self._core.failure

    @property
    def last_error(self) -> Exception | None:
        """Why requests have ended with errors, most recently."""
        return self._core.last_error
