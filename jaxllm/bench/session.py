"""An engine under measurement: runs requests, and says what that took."""

import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax

from jaxllm.bench.figures import percentiles
from jaxllm.bench.recorder import Recorder, Recording
from jaxllm.bench.workload import Item
from jaxllm.config import EngineConfig
from jaxllm.engine.engine import Engine
from jaxllm.engine.inputs import Prompt
from jaxllm.engine.loading import EngineParts
from jaxllm.engine.replicas import Replicas
from jaxllm.engine.replicating import load_engine
from jaxllm.engine.step_clock import PARTS
from jaxllm.runner.memory import bytes_per_device
from jaxllm.sampling.params import SamplingParams

MEMORY_KEYS = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")


@dataclass(frozen=True)
class Run:
    """One set of requests, from the first one's arrival to the last one's end."""

    seconds: float
    recording: Recording

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return sum(request.num_generation_tokens for request in self.recording.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, found in the cache or not."""
        return sum(request.num_prompt_tokens for request in self.recording.requests)

    @property
    def first_token_times(self) -> list[float]:
        """Each request's seconds to its first token."""
        return _known(request.time_to_first_token for request in self.recording.requests)

    def figures(self) -> dict[str, Any]:
        """Everything that was measured, in seconds, tokens and pages."""
        requests, steps = self.recording.requests, self.recording.steps
        return {
            "seconds": self.seconds,
            "requests": len(requests),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_per_second": self.output_tokens / self.seconds,
            "total_tokens_per_second": (self.prompt_tokens + self.output_tokens) / self.seconds,
            "ttft_seconds": percentiles(self.first_token_times),
            "tpot_seconds": percentiles(_times_per_token(self.recording)),
            "itl_seconds": percentiles(self.recording.token_latencies),
            "e2e_seconds": percentiles(_known(request.end_to_end_time for request in requests)),
            "steps": len(steps),
            "tokens_per_step": sum(step.num_tokens for step in steps) / max(1, len(steps)),
            "step_seconds": step_figures(self.recording),
            "pages_used_peak": max(self.recording.pages, default=0),
            "page_waste": self.recording.page_waste,
        }


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _times_per_token(recording: Recording) -> list[float]:
    """Each request's mean seconds from one token to the next."""
    return [
        (request.last_token_time - request.first_token_time) / (request.num_generation_tokens - 1)
        for request in recording.requests
        if request.num_generation_tokens > 1
        if request.first_token_time is not None and request.last_token_time is not None
    ]


def step_figures(recording: Recording) -> dict[str, Any]:
    """For each part of a step its seconds; `host` is all of the host's own work."""
    turns, steps = recording.turns, recording.steps
    read = [turn for turn in turns if turn.device]
    parts: dict[str, Any] = {"host": percentiles([step.host for step in steps])}
    for part in PARTS:
        parts[part] = percentiles([getattr(t, part) for t in (read if part == "device" else steps)])
    return parts


class Session:
    """An engine with a recorder in place of its metrics. To be used in a `with` statement."""

    def __init__(self, model: str, *, wait: bool = True, **options: Any) -> None:
        """Loads a model; `wait` for all of its programs, or measure as soon as it can serve."""
        self._host_before = peak_memory()["host_peak"]
        begin = time.perf_counter()
        self.parts: EngineParts = load_engine(EngineConfig.create(model, **options))
        self.engine = Engine(self.parts)
        self.load_seconds = time.perf_counter() - begin
        if wait:
            self.engine.wait_for_programs()
        self._recorders = [Recorder(core.scheduler) for core in self.parts.cores]
        for core, recorder in zip(self.parts.cores, self._recorders, strict=True):
            core.metrics = recorder
        if isinstance(self.parts.core, Replicas):
            self.parts.core.arrivals = Recorder(self.parts.cores[0].scheduler)
            self._recorders.insert(0, self.parts.core.arrivals)
        self.recorder = self._recorders[0]
        """The one that requests arrive at."""

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self.parts.model.vocab_size

    def params(self, output_len: int, **options: Any) -> SamplingParams:
        """Greedy, to the full length; with text where there is a tokenizer, as users get it."""
        text = self.parts.tokenizer is not None
        return SamplingParams(
            temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=text, **options
        )

    def generate(
        self, prompts: Sequence[Prompt], output_len: int, *, keep_cache: bool = False, **params: Any
    ) -> Run:
        """Runs prompts that come all at once, through `Engine.generate`.

        Args:
            keep_cache: let them find what the prompts before them left in the prefix cache.
            params: more sampling parameters.
        """
        recording = self.start_recording(keep_cache=keep_cache)
        begin = time.perf_counter()
        self.engine.generate(prompts, self.params(output_len, **params))
        return Run(time.perf_counter() - begin, recording)

    def serve(self, items: Sequence[Item]) -> Run:
        """Runs requests that come each at its time; latencies count from then, noticed late or not."""
        recording = self.start_recording()
        inputs = [(item.due, self._input(item)) for item in items]
        waiting = deque(sorted(enumerate(inputs), key=lambda entry: entry[1][0]))
        start = time.monotonic()
        while waiting or self.engine.has_unfinished_requests():
            while waiting and start + waiting[0][1][0] <= time.monotonic():
                number, (due, input) = waiting.popleft()
                self.recorder.due = start + due
                self.engine.add_input(f"bench-{number}", input)
            if self.engine.has_unfinished_requests():
                self.engine.step()
            else:
                time.sleep(max(0.0, start + waiting[0][1][0] - time.monotonic()))
        self.recorder.due = None
        return Run(time.monotonic() - start, recording)

    def _input(self, item: Item) -> Any:
        prompt = self.engine.render_chat(item.prompt) if item.is_chat else item.prompt
        return self.engine.make_input(prompt, self.params(item.output_len))

    def start_recording(self, *, keep_cache: bool = False) -> Recording:
        if not keep_cache:
            self.engine.reset_prefix_cache()
        recording = Recording()
        for recorder in self._recorders:
            recorder.recording = recording
        return recording

    def about(self) -> dict[str, Any]:
        """The engine itself: programs, pages, memory, and the device."""
        metrics = self.engine.get_metrics()
        device = self.parts.mesh.devices.flat[0]
        return {
            "model": self.parts.config.model.model,
            "dtype": str(jax.numpy.dtype(self.parts.model.dtype)),
            "device": f"{device.platform} ({device.device_kind})",
            "jax": jax.__version__,
            "load_seconds": self.load_seconds,
            "programs": int(metrics["programs"]),
            "programs_loaded": int(metrics["programs_loaded"]),
            "programs_compiled_late": int(metrics["programs_compiled_late_total"]),
            "compile_seconds": metrics["compile_seconds"],
            "pages": int(metrics["num_pages"]),
            "memory_bytes": self._memory(device),
        }

    def _memory(self, device: Any) -> dict[str, int]:
        """Peaks, and what of them is the engine's own: weights, pages and rows, in bytes on all devices.

        On CPU `host_besides` is what the peak has besides those: Python, the compiled programs, activations.
        """
        stages = [stage for core in self.parts.cores for stage in core.runner.stages]
        own = {
            name: sum(bytes_per_device(stage.arrays[place]) * stage.lowering.mesh.size for stage in stages)
            for place, name in enumerate(("weights", "pages", "rows"))
        }
        memory = peak_memory(device) | own
        if device.platform == "cpu":
            memory["host_besides"] = memory["host_peak"] - sum(own.values())
        return memory | {"host_before_loading": self._host_before}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()


def peak_memory(device: Any = None) -> dict[str, int]:
    """Most memory this process has had on the host, and what the device tells of its own; in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = (device.memory_stats() if device else None) or {}
    return memory | {f"device_{key}": stats[key] for key in MEMORY_KEYS if key in stats}
