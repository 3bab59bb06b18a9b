"""Runs a model over sequences in chunks and steps through the paged cache, as an engine would."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxllm.layers.attention import pages_spec
from jaxllm.layers.batch import Batch
from jaxllm.models import CausalLM, DecoderConfig, Parameter, merge, split
from jaxllm.parallel import make_mesh
from jaxllm.runner.kernels import choose_attention
from jaxllm.runner.products import choose_products
from pallas_kernels.paged_attention import Kernel, RaggedBatch

PAGE_SIZE = 4
STEP_TOKENS = 24
ROWS = 3


def make_weights(
    model: type[CausalLM],
    config: DecoderConfig,
    parameters: Mapping[str, Parameter],
    tensors: Mapping[str, np.ndarray],
    mesh: jax.sharding.Mesh,
) -> tuple[Array, ...]:
    """A model's arrays from a checkpoint's tensors, by the family's rules and nothing else."""
    assignment = model.rules.assign(parameters, tensors)
    assert not assignment.missing, assignment.missing
    assert not assignment.unread, assignment.unread
    arrays = []
    for path, parameter in parameters.items():
        origin = assignment.origins[path]
        array = origin.transform([tensors[name] for name in origin.sources], config.geometry)
        assert array.shape == parameter.shape, (path, array.shape, parameter.shape)
        placed = jax.device_put(array.astype(parameter.dtype), parameter.sharding(mesh))
        arrays.append(parameter.keep(placed, mesh))
    return tuple(arrays)


class PagedRunner:
    """A model, its weights and its pages. Row r's pages are scattered over the pool.

    Args:
        max_tokens: of each row.
    """

    def __init__(
        self,
        model: type[CausalLM],
        config: DecoderConfig,
        tensors: Mapping[str, np.ndarray],
        *,
        max_tokens: int = 64,
        backend: Kernel = "auto",
        products: str = "auto",
    ) -> None:
        self.mesh = make_mesh(config.tensor_parallel_size)
        packed_for = choose_products(products, config, self.mesh).backend
        structure, parameters = split(model, config, packed_for)
        self.weights = make_weights(model, config, parameters, tensors, self.mesh)
        pages = -(-max_tokens // PAGE_SIZE)
        order = 1 + np.random.RandomState(0).permutation(ROWS * pages)
        self.page_table = order.reshape(ROWS, pages).astype(np.int32)
        geometry = config.pages(1 + ROWS * pages, PAGE_SIZE)
        self.backend = choose_attention(backend, config, self.mesh, PAGE_SIZE).backend
        pool = self.backend.layout.array(geometry)
        sharding = NamedSharding(self.mesh, pages_spec(self.backend.layout))
        blank = np.zeros(pool.shape, pool.dtype)
        self.cache = tuple(jax.device_put(blank, sharding) for _ in range(config.num_layers))
        self.lengths = np.zeros(ROWS, np.int32)
        self.slots = tuple((0, layer) for layer in range(config.num_layers))
        self.run = jax.jit(partial(_run, structure), donate_argnums=1)

    def inputs(self, new: Mapping[int, Sequence[int]]) -> tuple[Any, Batch]:
        """Tokens and batch of a step that gives rows these tokens."""
        rows = sorted(new, key=lambda row: len(new[row]) != 1)
        counts = np.array([len(new[row]) for row in rows] + [0] * (ROWS - len(rows)))
        tokens, positions = np.zeros((2, STEP_TOKENS), np.int32)
        used = counts.sum()
        tokens[:used] = np.concatenate([new[row] for row in rows])
        positions[:used] = np.concatenate([self.lengths[row] + np.arange(len(new[row])) for row in rows])
        kv_lens = np.zeros(ROWS, np.int32)
        kv_lens[: len(rows)] = [self.lengths[row] + len(new[row]) for row in rows]
        table = np.zeros_like(self.page_table)
        table[: len(rows)] = self.page_table[rows]
        ragged = RaggedBatch(
            query_start=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
            kv_lens=jnp.asarray(kv_lens),
            page_table=jnp.asarray(table),
            num_rows=jnp.asarray([sum(len(new[row]) == 1 for row in rows), len(rows)], jnp.int32),
        )
        return jnp.asarray(tokens), Batch(jnp.asarray(positions), (ragged,), self.slots, self.backend)

    def step(self, new: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Gives rows these tokens, and returns each row's logits, `[tokens, vocab]`."""
        tokens, batch = self.inputs(new)
        with jax.set_mesh(self.mesh):
            logits, self.cache = self.run(self.weights, self.cache, tokens, batch)
        rows = sorted(new, key=lambda row: len(new[row]) != 1)
        ends = np.cumsum([len(new[row]) for row in rows])
        for row in rows:
            self.lengths[row] += len(new[row])
        return dict(zip(rows, np.split(np.asarray(logits)[: ends[-1]], ends[:-1]), strict=True))


def _run(
    structure: Any, weights: tuple[Array, ...], cache: tuple[Array, ...], tokens: Array, batch: Batch
) -> tuple[Array, tuple[Array, ...]]:
    model = merge(structure, weights)
    hidden, cache = model(tokens, cache, batch)
    return model.logits(hidden), cache


def continue_greedily(
    runner: PagedRunner, prompts: Sequence[np.ndarray], steps: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of two prompts its logits and greedy tokens, like the reference's.

    The first prompt is computed in chunks; the second joins while that goes on, and its last chunks run
    beside the first one's decode steps.
    """
    known = [prompt.tolist() for prompt in prompts]
    ends = [len(prompt) + steps for prompt in prompts]
    logits: list[list[np.ndarray]] = [[], []]
    chunks = ({0: 17}, {0: 11, 1: 6}, {0: 13, 1: 1}, {0: 1, 1: 9})
    done = [0, 0]
    for step in range(max(ends)):
        plan = chunks[step] if step < len(chunks) else {0: 1, 1: 7}
        new = {row: known[row][done[row] : done[row] + count] for row, count in plan.items()}
        new = {row: tokens for row, tokens in new.items() if tokens}
        if not new:
            break
        for row, out in runner.step(new).items():
            logits[row].append(out)
            done[row] += len(out)
            if done[row] == len(known[row]) < ends[row]:
                known[row].append(int(out[-1].argmax()))
    return [
        (np.concatenate(logits[row]), np.array(known[row][len(prompts[row]) :], np.int32)) for row in (0, 1)
    ]
