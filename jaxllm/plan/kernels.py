"""What a model's Pallas kernels have to do, counted from sizes: compilers cannot look into them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from jax.sharding import Mesh

from jaxllm.models.base import DecoderConfig
from jaxllm.plan.roofline import Work
from jaxllm.runner.kernels import attention_problems
from pallas_kernels.paged_attention import Problem
from pallas_kernels.paged_attention.work import attention_bytes, attention_flops


@dataclass(frozen=True)
class Kernels:
    """The kernels of all layers, on one chip.

    Attributes:
        attention: of each layer.
    """

    attention: Sequence[Problem]

    @classmethod
    def of(cls, model: DecoderConfig, mesh: Mesh, page_size: int) -> Self:
        """Those of a model that is cut for the mesh."""
        kinds = {problem.sliding_window: problem for problem in attention_problems(model, mesh, page_size)}
        return cls([kinds[window] for window in model.layer_windows])

    def work(self, rows: int, tokens: int, context: int) -> Work:
        """Of a step whose rows are all alike.

        Args:
            tokens: new ones of each row.
            context: keys of each row, the new tokens' included.
        """
        return Work(
            sum(attention_flops(problem, rows, tokens, context) for problem in self.attention),
            sum(attention_bytes(problem, rows, tokens, context) for problem in self.attention),
        )
