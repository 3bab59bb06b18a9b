"""Lowers the engine's programs from shapes alone: no weights and no pages need to exist."""

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array

from jaxllm.cache.groups import CacheLayout
from jaxllm.layers.attention import pages_spec
from jaxllm.layers.expert_copies import gather_slots
from jaxllm.models.base import DecoderConfig
from jaxllm.models.expert_slots import ExpertLayer
from jaxllm.models.stages import WHOLE, Stage
from jaxllm.parallel import DATA_GROUPS, EVERY_DEVICE, over_groups, partition_spec
from jaxllm.runner.buckets import Bucket, Buckets
from jaxllm.runner.step import (
    DeviceRows,
    Forward,
    Merge,
    admit_row,
    load_masks,
    receive_tokens,
    run_forward,
    run_gathered,
    run_sampler,
    score_tokens,
)
from jaxllm.runner.step_input import StepLayout
from jaxllm.sampling.logprobs import token_logprobs
from jaxllm.sampling.params import SamplingParams
from jaxllm.sampling.settings import row_settings
from jaxllm.sampling.state import Feature, RowSettings, SamplerConfig, empty_state
from pallas_kernels.packed_matmul import Backend as ProductsBackend
from pallas_kernels.paged_attention import Backend


@dataclass(frozen=True)
class Sizes:
    """What is static in every program; rows and tokens are those of a data group."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    bucket_growth: int
    """How many times as many tokens the next larger program takes."""
    num_logprobs: int
    """Likeliest tokens reported at a position where logprobs are asked for."""
    count_experts: bool = False
    """Forward passes count the tokens that go to each expert."""

    @property
    def table_width(self) -> int:
        """Pages of the longest request."""
        return -(-self.max_model_len // self.page_size)


@dataclass(frozen=True)
class Lowering:
    """The programs of one model, or of one stage of it, on one mesh, which all its data groups run at a time.

    Attributes:
        params: shapes and shardings of the weights, in the order that `merge` takes them.
        layout: which layers share page tables, and which pool holds each layer's pages.
        backend: the attention kernel.
        products: what multiplies with weights, packed for it; None: XLA, with weights as they are.
        stage: what of the model it is; by default all.
        experts: where the weights of experts are that have slots to move between.
        comes_from_host, goes_to_host: whether hidden states come from another host, or go to one. Each device
            then has a part of them, so that a network carries each part once.
    """

    model: DecoderConfig
    merge: Merge
    params: tuple[jax.ShapeDtypeStruct, ...]
    mesh: Mesh
    layout: CacheLayout
    sizes: Sizes
    sampler: SamplerConfig
    backend: Backend
    products: ProductsBackend | None = None
    stage: Stage = WHOLE
    experts: tuple[ExpertLayer, ...] = ()
    comes_from_host: bool = False
    goes_to_host: bool = False

    def with_max_model_len(self, max_model_len: int) -> "Lowering":
        """The same for requests of another greatest length."""
        return dataclasses.replace(self, sizes=dataclasses.replace(self.sizes, max_model_len=max_model_len))

    @cached_property
    def buckets(self) -> Buckets:
        """The shapes that steps are padded to."""
        sizes, on_cpu = self.sizes, self.mesh.devices.flat[0].platform == "cpu"
        return Buckets.up_to(
            sizes.max_num_batched_tokens, sizes.max_num_seqs, sizes.bucket_growth, with_few_rows=on_cpu
        )

    @cached_property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def entering(self) -> NamedSharding:
        """Of hidden states from the stage before."""
        return self.in_parts if self.comes_from_host else self.replicated

    @cached_property
    def in_parts(self) -> NamedSharding:
        """Of hidden states between hosts; whole on each device where their width cannot be shared evenly."""
        even = self.model.hidden_size % self.mesh.size == 0
        return NamedSharding(self.mesh, PartitionSpec(None, EVERY_DEVICE)) if even else self.replicated

    @cached_property
    def num_groups(self) -> int:
        """Data groups: each has rows, pages and steps of its own, of the sizes that are given here."""
        return self.mesh.shape[DATA_GROUPS]

    @cached_property
    def table_shape(self) -> tuple[int, int, int]:
        """Page tables of a data group: cache groups, rows and a spare one, pages of the longest request."""
        return (len(self.layout.groups), self.sizes.max_num_seqs + 1, self.sizes.table_width)

    def step_layout(self, bucket: Bucket) -> StepLayout:
        """How a step of this bucket is uploaded."""
        return self._step_layouts[bucket]

    @cached_property
    def _step_layouts(self) -> dict[Bucket, StepLayout]:
        size = self.sizes.page_size
        return {bucket: StepLayout(bucket, self.table_shape, size) for bucket in self.buckets.sizes}

    def cache_shapes(self, num_pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The pools of pages, the null page included."""
        layout, spec = self.backend.layout, pages_spec(self.backend.layout)
        pool, longer = (
            layout.array(self.model.pages(count, self.sizes.page_size))
            for count in (num_pages, num_pages + 1)
        )
        # where pages follow one another is private to the layout, but for its shape
        axis = next(
            i for i, (one, other) in enumerate(zip(pool.shape, longer.shape, strict=True)) if one != other
        )
        return (self._by_request(pool, axis, spec),) * self.layout.num_pools

    def empty_rows(self) -> DeviceRows:
        """Rows that no request has yet, of all data groups. To be jitted."""
        groups, rows, columns = self.table_shape
        rows, stage = rows * self.num_groups, self.stage
        at_an_end = stage.is_first or stage.is_last
        return DeviceRows(
            jnp.zeros((rows, self.sizes.max_model_len + 1), jnp.int32) if at_an_end else None,
            jnp.zeros((groups, rows, columns), jnp.int32),
            empty_state(self.sampler, rows) if stage.is_last else None,
        )

    @cached_property
    def rows_shapes(self) -> DeviceRows:
        """Shapes of `empty_rows`."""
        tokens, tables, sampler = jax.eval_shape(self.empty_rows)

        def placed(shapes: Any, sharding: NamedSharding) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

        by_row = self._by_row
        tables = placed(tables, self._sharding(None, "requests"))
        return DeviceRows(placed(tokens, by_row), tables, placed(sampler, by_row))

    @cached_property
    def _by_row(self) -> NamedSharding:
        """Along its first axis each data group has its own part."""
        return self._sharding("requests")

    @cached_property
    def _rows_shardings(self) -> Any:
        return jax.tree.map(lambda x: x.sharding, self.rows_shapes)

    def _sharding(self, *axes: str | None) -> NamedSharding:
        """One data group is no cut at all."""
        return NamedSharding(self.mesh, partition_spec(axes)) if self.num_groups > 1 else self.replicated

    def programs(self, num_pages: int) -> dict[Hashable, Callable[[], Lowered]]:
        """The closed set, by key, in the order in which it is best made: see `first_programs`.

        The rest follow from large to small, since a bucket can run the steps of all smaller ones.
        """
        found: dict[Hashable, Callable[[], Lowered]] = {
            ("admit", tables): partial(self.admit, tables) for tables in (False, True)
        }
        found |= {"empty": partial(self.empty, num_pages), "score": self.score}
        for bucket in self.buckets.sizes[::-1]:
            found["forward", bucket.tokens, bucket.rows] = partial(self.forward, bucket, num_pages)
            for name, lower in self._after_forward.items():
                found[name, bucket.sampled] = partial(lower, bucket.sampled)
        found |= {self.gather_key(like): partial(self.gather, like) for like in self.experts_like}
        rest = [key for key in found if key != "score"]
        return {key: found[key] for key in dict.fromkeys([*self.first_programs, *rest])}

    @property
    def first_programs(self) -> list[Hashable]:
        """The fewest that run every request well: of the largest step, and of the smallest, which decodes."""
        keys = [key for bucket in self.first_buckets for key in self.step_programs(bucket)]
        scores = ["score"] if self.stage.is_last else []
        return list(dict.fromkeys(["empty", *keys, ("admit", False), ("admit", True), *scores]))

    def step_programs(self, bucket: Bucket) -> list[Hashable]:
        """Keys of the programs that a step of this bucket may run, besides those that serve all."""
        forward = ("forward", bucket.tokens, bucket.rows)
        return [forward, *((name, bucket.sampled) for name in self._after_forward)]

    @property
    def _after_forward(self) -> dict[str, Callable[[int], Lowered]]:
        """What the stage runs after a forward pass, for so many rows."""
        if self.stage.is_last:
            return {"sample": self.sample, "masks": self.masks, "logprobs": self.logprobs}
        return {"receive": self.receive} if self.stage.is_first else {}

    @property
    def first_buckets(self) -> tuple[Bucket, Bucket]:
        """Those of `first_programs`."""
        return self.buckets.largest, self.buckets.sizes[0]

    def empty(self, num_pages: int) -> Lowered:
        """Makes pages and rows that hold nothing."""
        cache = self.cache_shapes(num_pages)

        def make() -> tuple[tuple[Array, ...], DeviceRows]:
            return tuple(jnp.zeros(pool.shape, pool.dtype) for pool in cache), self.empty_rows()

        out = (tuple(pool.sharding for pool in cache), self._rows_shardings)
        with jax.set_mesh(self.mesh):
            return jax.jit(make, out_shardings=out).lower()

    def forward(self, bucket: Bucket, num_pages: int) -> Lowered:
        """A step's forward pass: cache and page tables are donated."""
        layout = self.step_layout(bucket)
        function = partial(
            run_forward,
            merge=self.merge,
            layout=layout,
            slots=self.layout.slots,
            backend=self.backend,
            stage=self.stage,
            first_layer=self.stage.layers(self.model.num_layers).start,
            count_experts=self.sizes.count_experts,
        )
        cache = self.cache_shapes(num_pages)
        leaving = self.in_parts if self.goes_to_host else self._by_row
        outputs: list[Any] = [self._by_row] * 3 + [leaving, self._sharding(None, "requests")]
        pools = tuple(pool.sharding for pool in cache)
        shardings = (pools, self._rows_shardings.tables, Forward(*outputs))
        rows = self.rows_shapes
        entering = rows.tokens if self.stage.is_first else self._hidden(bucket.tokens, self.entering)
        if self.comes_from_host:
            function = partial(run_gathered, forward=function, whole=self.replicated)
        packed = self._ids(layout.size)
        return self._lower(function, (1, 2), shardings, self.params, cache, rows.tables, entering, packed)

    def sample(self, sampled: int) -> Lowered:
        """Samples after a forward pass: the rows' tokens and the sampler's state are donated."""
        function = partial(run_sampler, sampler=self.sampler)
        ids, rows = self._ids(sampled), self.rows_shapes
        return self._lower(
            function, (0, 1), self._by_row, rows.tokens, rows.sampler, self._logits(sampled), ids, ids
        )

    def masks(self, sampled: int) -> Lowered:
        """Takes the masks of rows that are held to a grammar, between forward pass and sampler.

        So steps without such rows run the same programs as ever, and the sampler knows nothing of grammars.
        """
        state = self.rows_shapes.sampler
        assert state is not None
        allowed = state.tables.allowed
        masks = self._by_request(jax.ShapeDtypeStruct((sampled, allowed.shape[1]), jnp.uint32))
        return self._lower(load_masks, (0,), self._by_row, allowed, self._ids(sampled), masks)

    def receive(self, sampled: int) -> Lowered:
        """Takes what another stage has sampled: the rows' tokens are donated."""
        ids = self._ids(sampled)
        return self._lower(receive_tokens, (0,), self._by_row, self.rows_shapes.tokens, ids, ids, ids)

    def admit(self, with_tables: bool) -> Lowered:
        """Loads a row; most requests need none of the sampler's tables."""
        tokens, tables = self._on_all(
            (
                jax.ShapeDtypeStruct((self.sizes.max_model_len + 1,), jnp.int32),
                jax.ShapeDtypeStruct((self.table_shape[0], self.table_shape[2]), jnp.int32),
            )
        )
        settings = self._on_all(_shapes_of(self._settings_example(with_tables)))
        rows, row = self.rows_shapes, self._ids(1)
        return self._lower(admit_row, (0,), self._rows_shardings, rows, row, tokens, tables, settings)

    def logprobs(self, sampled: int) -> Lowered:
        """Logprobs of the tokens that a step sampled."""
        function = partial(token_logprobs, k=self.sizes.num_logprobs)
        return self._lower(function, (), self._by_row, self._logits(sampled), self._ids(sampled))

    def score(self) -> Lowered:
        """Logprobs of the tokens of prompts, after a step of the largest bucket."""
        tokens = self.buckets.largest.tokens
        function = partial(score_tokens, merge=self.merge, k=self.sizes.num_logprobs)
        hidden, targets = self._hidden(tokens), self._ids(tokens)
        return self._lower(function, (), self._by_row, self.params, hidden, targets)

    def gather_key(self, like: jax.ShapeDtypeStruct) -> Hashable:
        """Of the program that moves such weights of experts between slots."""
        return ("gather", self.experts_like.index(like))

    def gather(self, like: jax.ShapeDtypeStruct) -> Lowered:
        """Moves experts between slots. The weights are donated, and yet there twice while it runs."""
        sharding = like.sharding
        assert isinstance(sharding, NamedSharding)
        source = self._on_all(jax.ShapeDtypeStruct(like.shape[:1], jnp.int32))
        gather = partial(gather_slots, sharding=sharding)  # over all data groups as they are
        return jax.jit(gather, donate_argnums=0, out_shardings=sharding).lower(like, source)

    @property
    def gather_programs(self) -> list[Hashable]:
        """Keys of the programs that place experts anew."""
        return [self.gather_key(like) for like in self.experts_like]

    @cached_property
    def experts_like(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and shardings of weights that move between slots: layers are alike."""
        return tuple(dict.fromkeys(self.params[place] for layer in self.experts for place in layer.weights))

    def _ids(self, count: int) -> jax.ShapeDtypeStruct:
        return self._by_request(jax.ShapeDtypeStruct((count,), jnp.int32))

    def _hidden(self, tokens: int, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        part = jax.ShapeDtypeStruct((tokens, self.model.hidden_size), self.model.dtype, sharding=sharding)
        return self._by_request(part) if sharding is None else part

    def hidden_in_parts(self, tokens: int) -> jax.ShapeDtypeStruct:
        """What goes to another host, or comes from one, with a step of so many tokens."""
        return self._hidden(tokens, self.in_parts)

    def _logits(self, sampled: int) -> jax.ShapeDtypeStruct:
        return self._by_request(jax.ShapeDtypeStruct((sampled, self.model.vocab_size), jnp.float32))

    def _by_request(
        self, part: jax.ShapeDtypeStruct, axis: int = 0, spec: PartitionSpec | None = None
    ) -> jax.ShapeDtypeStruct:
        """The parts of all data groups, one after the other along an axis.

        Args:
            spec: how a part is cut over the devices of its group; by default it is whole on each.
        """
        shape, spec = list(part.shape), PartitionSpec() if spec is None else spec
        if self.num_groups > 1:
            shape[axis] *= self.num_groups
            cut = [*spec, *[None] * (len(shape) - len(spec))]
            cut[axis] = DATA_GROUPS
            spec = PartitionSpec(*cut)
        return jax.ShapeDtypeStruct(shape, part.dtype, sharding=NamedSharding(self.mesh, spec))

    def _lower(self, function: Callable[..., Any], donated: tuple[int, ...], out: Any, *args: Any) -> Lowered:
        """Lowers what runs on all data groups at a time, each with its own part of arguments and results."""
        if self.num_groups > 1:
            function = jax.shard_map(
                function,
                mesh=self.mesh.abstract_mesh,
                in_specs=jax.tree.map(lambda x: over_groups(x.sharding.spec), args),
                out_specs=jax.tree.map(lambda x: over_groups(x.spec), out),
                axis_names={DATA_GROUPS},
                check_vma=False,  # kernels say nothing about how their results vary over the mesh
            )
        with jax.set_mesh(self.mesh):
            return jax.jit(function, donate_argnums=donated, out_shardings=out).lower(*args)

    def _on_all(self, shapes: Any) -> Any:
        """The same shapes, whole on every device."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), shapes
        )

    def _settings_example(self, with_tables: bool) -> RowSettings:
        params = SamplingParams(presence_penalty=1.0 if with_tables else 0.0)
        settings = row_settings(self.sampler, params, seed=0, prompt_token_ids=[])
        assert bool(settings.scalars.features & Feature.COUNTS) == with_tables
        return settings


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), tree)
