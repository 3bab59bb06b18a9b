"""An engine's figures, of all its replicas together and of each."""

from jaxllm.engine.loading import EngineParts
from jaxllm.engine.metrics import choice_metrics, metric_labels
from jaxllm.engine.replicas import Replicas
from jaxllm.runner.programs import program_figures


def engine_figures(parts: EngineParts) -> dict[str, float]:
    """See `Engine.get_metrics`."""
    products = parts.products
    return (
        parts.core.get_metrics()
        | program_figures([core.runner.programs for core in parts.cores])
        | choice_metrics("attention_backend_info", parts.attention)
        | {f"matmul_backend_info{metric_labels(backend=products.name, reason=products.reason)}": 1.0}
    )


def replica_figures(parts: EngineParts) -> dict[str, dict[str, float]]:
    """See `Engine.get_replica_metrics`."""
    core = parts.core
    found = core.figures() if isinstance(core, Replicas) else {"0": core.get_metrics()}
    for number, own in enumerate(parts.cores):
        up = {"replica_up": float(own.failure is None)}
        found[str(number)] |= up | program_figures([own.runner.programs])
    return found
