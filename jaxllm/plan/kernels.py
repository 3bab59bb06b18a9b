"""What a model's Pallas kernels have to do, counted from sizes: compilers cannot look into them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.models.base import DecoderConfig
from jaxllm.parallel import DATA_GROUPS
from jaxllm.plan.roofline import Work
from jaxllm.runner.kernels import attention_problems
from pallas_kernels.grouped_matmul import Problem as GroupedProblem
from pallas_kernels.grouped_matmul.work import expected_groups, grouped_bytes, grouped_flops
from pallas_kernels.paged_attention import Problem
from pallas_kernels.paged_attention.work import attention_bytes, attention_flops


@dataclass(frozen=True)
class Kernels:
    """The kernels of some layers, on one chip.

    Attributes:
        attention: of each layer.
        model: cut for the mesh.
        grouped: products with experts' weights that are kernels, of all these layers.
        groups: data groups, whose tokens all come to the experts.
    """

    attention: Sequence[Problem]
    model: DecoderConfig
    grouped: int
    groups: int = 1

    @classmethod
    def of(cls, model: DecoderConfig, layers: range, mesh: Mesh, page_size: int, grouped: int) -> Self:
        """Those of a model's layers of these numbers, cut for the mesh."""
        kinds = {problem.sliding_window: problem for problem in attention_problems(model, mesh, page_size)}
        return cls(
            [kinds[model.layer_windows[layer]] for layer in layers], model, grouped, mesh.shape[DATA_GROUPS]
        )

    def work(self, rows: int, tokens: int, context: int) -> Work:
        """Of a step whose rows are all alike, in every data group.

        Args:
            tokens: new ones of each row.
            context: keys of each row, the new tokens' included.
        """
        attention = Work(
            sum(attention_flops(problem, rows, tokens, context) for problem in self.attention),
            sum(attention_bytes(problem, rows, tokens, context) for problem in self.attention),
        )
        return attention + self._experts(self.groups * rows * tokens)

    def _experts(self, tokens: int) -> Work:
        """Half of the products lead into the experts, half out of them. Tokens are spread at random.

        Copies are as good as further experts.
        """
        mixture = self.model.mixture
        if mixture is None:
            return Work()
        routing, parts = mixture.routing, self.groups * self.model.expert_parallel_size
        used = expected_groups(mixture.slots, routing.per_token, tokens) / parts
        rows, experts = -(-tokens * routing.per_token // parts), mixture.slots // parts
        size = mixture.expert_size // self.model.tensor_parallel_size
        products = [
            self._product(rows, experts, self.model.hidden_size, 2 * size),
            self._product(rows, experts, size, self.model.hidden_size),
        ]
        return Work(
            self.grouped / 2 * sum(map(grouped_flops, products)),
            self.grouped / 2 * sum(grouped_bytes(product, used) for product in products),
        )

    def _product(self, rows: int, experts: int, inputs: int, outputs: int) -> GroupedProblem:
        dtype, device = jnp.dtype(self.model.dtype), self.attention[0]
        return GroupedProblem(
            device.platform,
            device.device_kind,
            rows,
            experts,
            inputs,
            outputs,
            dtype,
            dtype,
            jnp.dtype(jnp.float32),
        )
