"""A model on chips that need not be there: what it takes of them, and what it would give at best."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxllm.plan.estimate import Estimate
from jaxllm.plan.layout import Layout
from jaxllm.plan.memory import ChipMemory
from jaxllm.plan.step import Step
from jaxllm.plan.workload import Workload


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        model: as it was asked for.
        weight_bytes: of a replica, all its chips together; what every chip has a copy of counts once.
        attention_backend: the kernel that "auto" took, or the one that was asked for.
        max_model_len: most tokens of a request; fewer than the model's where the pages hold no more.
        full_requests: of `max_model_len` tokens, that each replica's pages hold at the same time.
        workload_requests: the same of the workload's requests.
        prefill, decode: steps of the largest bucket, and of one token for each request.
        compiled_layers: numbers of layers of the models that were compiled. Where they are not the model's
            own, `prefill` and `decode` are extrapolated from these.
    """

    model: str
    layout: Layout
    dtype: str
    num_layers: int
    weight_bytes: int
    attention_backend: str
    max_model_len: int
    memory: ChipMemory
    full_requests: int
    workload_requests: int
    prefill: Step
    decode: Step
    compiled_layers: tuple[int, ...]
    workload: Workload
    estimate: Estimate

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, as `jaxllm plan --json` prints it."""
        values = dataclasses.asdict(dataclasses.replace(self, layout=None))  # pyright: ignore[reportArgumentType]
        layout = {
            "target": str(self.layout.target),
            "chips": self.layout.num_chips,
            "tensor_parallel_size": self.layout.tensor_parallel_size,
            "expert_parallel_size": self.layout.expert_parallel_size,
            "data_parallel_size": self.layout.data_parallel_size,
            "replica": str(self.layout.replica),
        }
        for name in ("prefill", "decode"):
            values["estimate"][name]["total"] = getattr(self.estimate, name).total
        return {**values, "layout": layout}
