"""The contract between models and whoever runs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from converters.rules import Geometry, Table
from jaxllm.layers.attention import AttentionOptions
from jaxllm.layers.batch import Batch, Cache
from jaxllm.layers.embedding import padded_size
from jaxllm.layers.latent_attention import LatentSizes
from jaxllm.layers.moe import MixtureOptions
from jaxllm.layers.norm import NormOptions
from jaxllm.layers.rope import Rope
from pallas_kernels.paged_attention import PageGeometry


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's sizes and options, checked against the mesh it is to be cut for.

    Attributes:
        num_kv_heads: key-value heads as the checkpoint has them; see `cache_heads` for how many are kept.
        layer_windows: for each layer how many positions a token sees; None: all.
        layer_ropes: for each layer its rotary embedding; None: it has none.
        activation: Hugging Face's name of the feed-forward layers' function.
        embedding_scale: multiplies the embeddings of tokens.
        final_soft_cap: bounds the logits: `cap * tanh(logits / cap)`.
        mixture: for models with experts, how they are chosen and what they are like.
        latent: for models with latent attention, its sizes; then `num_kv_heads` is 1, and `head_dim` that of
            what is kept of a token.
        dense_layers: layers of such a model that have one feed-forward layer instead.
        tensor_parallel_size, expert_parallel_size: of the mesh. Heads and columns are cut over the product,
            experts over the second, and an expert's columns over the first.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: NormOptions
    tie_word_embeddings: bool
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[Rope | None, ...]
    attention: AttentionOptions
    dtype: jnp.dtype
    tensor_parallel_size: int = 1
    activation: str = "silu"
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    final_soft_cap: float | None = None
    mixture: MixtureOptions | None = None
    latent: LatentSizes | None = None
    dense_layers: frozenset[int] = frozenset()
    expert_parallel_size: int = 1

    def __post_init__(self) -> None:
        self._divides("num_attention_heads", self.num_heads, "num_key_value_heads", self.num_kv_heads)
        size, sizes = self.devices_per_layer, "tensor_parallel_size"
        if self.expert_parallel_size > 1:
            sizes = "tensor_parallel_size * expert_parallel_size"
        self._check_experts(self.mixture, sizes)
        self._divides("num_attention_heads", self.num_heads, sizes, size)
        if self.mixture is None or self.dense_layers:
            self._divides("intermediate_size", self.intermediate_size, sizes, size)
        if self.num_kv_heads >= size:
            self._divides("num_key_value_heads", self.num_kv_heads, sizes, size)
        else:
            self._divides(sizes, size, "num_key_value_heads", self.num_kv_heads)
        for name in ("layer_windows", "layer_ropes"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(f"{name}: must have an entry for each of the {self.num_layers} layers")

    def _check_experts(self, mixture: MixtureOptions | None, sizes: str) -> None:
        """Experts are cut along the mesh's axis of their own, and each along the other."""
        experts, tensor = self.expert_parallel_size, self.tensor_parallel_size
        if mixture is not None:
            self._divides("moe_intermediate_size", mixture.expert_size, "tensor_parallel_size", tensor)
            self._divides("num_experts", mixture.routing.experts, "expert_parallel_size", experts)
            shared = "shared_expert_intermediate_size"
            self._divides(shared, mixture.shared_size, sizes, self.devices_per_layer)
        elif experts > 1:
            raise ValueError(
                f"expert_parallel_size={experts}: the model has no experts; use tensor_parallel_size"
            )

    @staticmethod
    def _divides(name: str, value: int, by: str, divisor: int) -> None:
        if divisor < 1 or value % divisor:
            raise ValueError(f"{name}={value}: must be a multiple of {by}={divisor}")

    @property
    def devices_per_layer(self) -> int:
        """Devices that share each layer's heads and columns."""
        return self.tensor_parallel_size * self.expert_parallel_size

    @property
    def kv_copies(self) -> int:
        """How often each key-value head is repeated, so that every device owns one."""
        return max(1, self.devices_per_layer // self.num_kv_heads)

    @property
    def cache_heads(self) -> int:
        """Key-value heads in the pages, copies included."""
        return self.num_kv_heads * self.kv_copies

    @property
    def geometry(self) -> Geometry:
        """What the checkpoint's transforms need to know."""
        return Geometry(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            padded_vocab_size=padded_size(self.vocab_size, self.devices_per_layer),
            kv_copies=self.kv_copies,
            plain_dim=self.latent.plain if self.latent else 0,
            rotated_dim=self.latent.rotated if self.latent else 0,
        )

    def pages(self, num_pages: int, page_size: int) -> PageGeometry:
        """One layer's pool of pages on all devices."""
        shared = self.latent is not None
        dtype = jnp.dtype(self.dtype)
        return PageGeometry(num_pages, page_size, self.cache_heads, self.head_dim, dtype, shared)


class CausalLM(nnx.Module):
    """A language model over flat ragged batches with paged keys and values.

    What the engine asks of a model, whoever wrote it. Modules are made by `jaxllm.models.abstract`, under the
    mesh that `jax.set_mesh` made current; so are calls.

    Attributes:
        rules: how parameters are made from a Hugging Face checkpoint's tensors.
    """

    rules: ClassVar[Table]
    config: DecoderConfig

    @classmethod
    def read_config(
        cls,
        hf: Mapping[str, Any],
        *,
        dtype: Any,
        tensor_parallel_size: int,
        max_model_len: int | None = None,
    ) -> DecoderConfig:
        """Reads a Hugging Face config.

        Args:
            hf: the content of config.json, as any version of transformers wrote it.
            dtype: of weights and activations.
            tensor_parallel_size: devices that share each layer.
            max_model_len: the most tokens a sequence will have, where that is fewer than the model allows:
                LongRoPE has one set of frequencies for short contexts and one for long.

        Raises:
            ValueError: a field that is missing, or has a value that changes the model in a way not supported,
                or a size that does not divide by `tensor_parallel_size`; the message names it.
        """
        raise NotImplementedError

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    def __call__(
        self, tokens: Int[Array, " tokens"], cache: Cache, batch: Batch
    ) -> tuple[Float[Array, "tokens embed"], Cache]:
        """Runs a step.

        Args:
            tokens: ids, flat, as `batch` lays them out.
            cache: pools of pages, indexed by the slots of `batch`.

        Returns:
            Hidden states after the last norm, and the cache with the step's keys and values in it.
        """
        raise NotImplementedError

    def logits(self, hidden: Float[Array, "n embed"]) -> Float[Array, "n vocab"]:
        """Scores of the whole vocabulary, in float32, for some of the hidden states of a step."""
        raise NotImplementedError
