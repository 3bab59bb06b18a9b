"""What a model would take and give on chips that need not be there: `jaxllm plan`.

plan = make_plan("meta-llama/Meta-Llama-3-8B", "v5e:2x4", tensor_parallel_size=8)
plan.memory.num_pages, plan.estimate.output_tokens_per_second
"""

import math
from typing import Any

from jaxllm.plan.plan import Plan
from jaxllm.plan.planner import planner_of
from jaxllm.plan.search import plan_or_advise
from jaxllm.plan.workload import Workload
from pallas_kernels.targets import Target


def make_plan(
    model: str,
    target: str,
    *,
    data_parallel_size: int | None = None,
    data_parallel_experts: bool = False,
    input_len: int = 1024,
    output_len: int = 256,
    concurrency: int | None = None,
    price_per_chip_hour: float | None = None,
    few_layers: bool = False,
    **options: Any,
) -> Plan:
    """Compiles the engine's steps for chips that need not be there, and reads what they need.

    The compilers come with `pip install -e '.[plan]'` in the clone. A process that has none of the chips
    should set JAX_PLATFORMS=cpu and TPU_SKIP_MDS_QUERY=1 before it imports jax.

    Args:
        model: a repo id, a folder, a config.json or a GGUF file; no weights are read.
        target: chips, such as "v5e:2x4", "v5p:2x2x4" or "h100:8".
        data_parallel_size: replicas, or data groups; None: as many as there are chips for.
        data_parallel_experts: data groups of one engine, which share the experts, rather than replicas.
        input_len, output_len, concurrency: see `jaxllm.plan.workload.Workload`.
        price_per_chip_hour: in dollars.
        few_layers: compile models of a few layers, and extrapolate from them.
        options: of the engine, by their names in `EngineConfig`: `tensor_parallel_size`, `max_model_len`, ...

    Raises:
        CheckpointError: the model's config cannot be found, read or reached.
        NotImplementedError: a kernel that was asked for does not serve the model.
        RuntimeError: the compiler for the chips is not installed; the message has the command that does.
        TypeError: an option that no plan depends on.
        ValueError: no such target, a layout that does not divide, a model that does not fit or is not
            supported, a price that is none.
    """
    if price_per_chip_hour is not None and not 0 < price_per_chip_hour < math.inf:
        raise ValueError(f"price_per_chip_hour={price_per_chip_hour}: must be above 0 and finite")
    workload = Workload(input_len, output_len, concurrency)
    planner = planner_of(model, workload, few_layers=few_layers, options=options)
    layout = planner.layout(
        Target.parse(target), data_parallel_size, data_parallel_experts=data_parallel_experts
    )
    return plan_or_advise(planner, layout, price_per_chip_hour)
