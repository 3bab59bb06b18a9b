"""An engine's figures, of all its replicas together and of each."""

from collections import Counter
from collections.abc import Sequence

from jaxllm.engine.core import EngineCore
from jaxllm.engine.expert_balancer import balance_figures
from jaxllm.engine.loading import EngineParts
from jaxllm.engine.metrics import choice_metrics, metric_labels
from jaxllm.engine.replicas import Replicas
from jaxllm.runner.programs import program_figures


def engine_figures(parts: EngineParts) -> dict[str, float]:
    """See `Engine.get_metrics`."""
    return parts.core.get_metrics() | _runner_figures(parts.cores) | _choice_figures(parts)


def replica_figures(parts: EngineParts) -> dict[str, dict[str, float]]:
    """See `Engine.get_replica_metrics`."""
    core, choices = parts.core, _choice_figures(parts)
    found = core.figures() if isinstance(core, Replicas) else {"0": core.get_metrics()}
    for number, own in enumerate(parts.cores):
        up = {"replica_up": float(own.failure is None)}
        found[str(number)] |= up | _runner_figures([own]) | choices
    return found


def _runner_figures(cores: Sequence[EngineCore]) -> dict[str, float]:
    """Programs, how often those of each size have run, and how evenly experts are spread."""
    steps: Counter[int] = Counter()
    for core in cores:
        steps.update(core.runner.bucket_steps.copy())  # which another thread may be writing to
    run = {
        f"bucket_steps_total{metric_labels(tokens=str(tokens))}": float(count)
        for tokens, count in sorted(steps.items())
    }
    programs = program_figures([core.runner.programs for core in cores])
    return programs | run | balance_figures(core.balancer for core in cores)


def _choice_figures(parts: EngineParts) -> dict[str, float]:
    """What runs, and why nothing else; the same in all replicas."""
    products = parts.products
    return choice_metrics("attention_backend_info", parts.attention) | {
        f"matmul_backend_info{metric_labels(backend=products.name, reason=products.reason)}": 1.0
    }
