"""A model on chips that need not be there: what it takes of them, and what it would give at best."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxllm.plan.estimate import Estimate
from jaxllm.plan.layout import Layout
from jaxllm.plan.memory import ChipMemory
from jaxllm.plan.placement import Place
from jaxllm.plan.step import Step
from jaxllm.plan.workload import Workload


@dataclass(frozen=True)
class StagePlan:
    """One stage of a replica; all of it where it has one.

    Attributes:
        layers: number of the first one, and of the one after the last.
        chips: their places in the replica's slice.
        memory: of each of its chips.
        prefill, decode: steps of the largest bucket, and of one token for each request that is in a step.
    """

    layers: tuple[int, int]
    chips: tuple[Place, ...]
    memory: ChipMemory
    prefill: Step
    decode: Step


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        model: as it was asked for.
        weight_bytes: of a replica, all its chips together; what several have a copy of counts once.
        attention_backend: the kernel that "auto" took, or the one that was asked for.
        max_model_len: most tokens of a request; fewer than the model's where the pages hold no more.
        full_requests: of `max_model_len` tokens, that the pages of each replica, or data group, hold at the
            same time.
        workload_requests: the same of the workload's requests.
        stages: in order; one where the model is not cut into any.
        compiled_layers: numbers of layers of the models, or of the stages, that were compiled.
        extrapolated: these are not the model's own, and its steps lie on the line through them.
    """

    model: str
    layout: Layout
    dtype: str
    num_layers: int
    weight_bytes: int
    attention_backend: str
    max_model_len: int
    stages: tuple[StagePlan, ...]
    full_requests: int
    workload_requests: int
    compiled_layers: tuple[int, ...]
    extrapolated: bool
    workload: Workload
    estimate: Estimate

    @property
    def fullest(self) -> int:
        """Number of the stage whose chips have the least memory left."""
        return min(range(len(self.stages)), key=lambda index: self.stages[index].memory.unused)

    @property
    def slowest(self) -> int:
        """Number of the stage that takes longest to decode."""
        times = self.estimate.decode
        return max(range(len(times)), key=lambda index: times[index].total)

    @property
    def memory(self) -> ChipMemory:
        """Of a chip of the fullest stage."""
        return self.stages[self.fullest].memory

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, as `jaxllm plan --json` prints it.

        What is each replica's, or data group's, is given for all `together` as well.
        """
        values = dataclasses.asdict(dataclasses.replace(self, layout=None))  # pyright: ignore[reportArgumentType]
        layout = {
            "target": str(self.layout.target),
            "chips": self.layout.num_chips,
            "tensor_parallel_size": self.layout.tensor_parallel_size,
            "expert_parallel_size": self.layout.expert_parallel_size,
            "pipeline_parallel_size": self.layout.pipeline_parallel_size,
            "data_parallel_size": self.layout.data_parallel_size,
            "data_parallel_experts": self.layout.data_parallel_experts,
            "replica": str(self.layout.replica),
        }
        each = {
            "num_pages": self.memory.num_pages,
            "full_requests": self.full_requests,
            "workload_requests": self.workload_requests,
            "requests": self.estimate.requests,
        }
        together = {name: self.layout.data_parallel_size * count for name, count in each.items()}
        for name in ("prefill", "decode"):
            for times, time in zip(values["estimate"][name], getattr(self.estimate, name), strict=True):
                times["total"] = time.total
        found = {"layout": layout, "together": together, "fullest": self.fullest, "slowest": self.slowest}
        return values | found
