"""Reading Hugging Face configs, whichever version of transformers wrote them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxllm.layers.mlp import find_activation
from jaxllm.layers.rope import Rope
from jaxllm.models.rope_scaling import read_rope

_REQUIRED = object()


class Fields:
    """A config's fields by name, with defaults as transformers has them, and what is not supported refused.

    Args:
        hf: the content of config.json.
        dtype, tensor_parallel_size, max_model_len: see `CausalLM.read_config`.
    """

    def __init__(
        self, hf: Mapping[str, Any], dtype: Any, tensor_parallel_size: int, max_model_len: int | None
    ) -> None:
        self._fields = hf
        self.dtype = jnp.dtype(dtype)
        self.tensor_parallel_size = tensor_parallel_size
        self.max_model_len = max_model_len
        self.only("quantization_config")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value; null counts as left out.

        Raises:
            ValueError: the config does not have it, and there is no default.
        """
        value = self._fields.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{name}: missing in the model's config.json, which must give it")
        return default

    def is_null(self, name: str) -> bool:
        """Whether the config says null, where that means something else than the default."""
        return name in self._fields and self._fields[name] is None

    def whole(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        """A count of at least `least`."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} in config.json: must be a whole number of at least {least}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} in config.json: must be a finite number")
        return float(value)

    def cap(self, name: str, default: float | None) -> float | None:
        """A soft cap; null for none, and the default only where the field is left out."""
        if name in self._fields and self._fields[name] is None:
            return None
        if default is None and name not in self._fields:
            return None
        value = self.number(name, default)
        if value <= 0:
            raise ValueError(f"{name}={value!r} in config.json: must be positive, or null")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} in config.json: must be true or false")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a field with any other value than `allowed`, null or none.

        Raises:
            ValueError: it has; the message names the values that are supported.
        """
        value = self._fields.get(name)
        if value is not None and value not in allowed:
            values = " or ".join(["null", *map(repr, allowed)])
            raise ValueError(f"{name}={value!r} in config.json: not supported; supported is {values}")

    def activation(self, name: str, default: str) -> str:
        """The name of a function that feed-forward layers know."""
        value = self.get(name, default)
        try:
            find_activation(value)
        except ValueError as error:
            raise ValueError(str(error).replace("hidden_act=", f"{name}=", 1)) from None
        return value

    def head_dim(self, default: int | None = None) -> int:
        """Width of a head: the field, the default, or the hidden size shared by the heads."""
        if self.get("head_dim", default) is not None:
            return self.whole("head_dim", default)
        size, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        if size % heads:
            raise ValueError(f"hidden_size={size}: must be a multiple of num_attention_heads={heads}")
        return size // heads

    def sizes(self, **defaults: int) -> dict[str, Any]:
        """The fields of `DecoderConfig` that all families read alike, less `head_dim`."""
        heads = self.whole("num_attention_heads")
        return {
            "vocab_size": self.whole("vocab_size"),
            "hidden_size": self.whole("hidden_size"),
            "intermediate_size": self.whole(
                "intermediate_size", defaults.get("intermediate_size", _REQUIRED)
            ),
            "num_layers": self.whole("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.whole("num_key_value_heads", heads),
            "max_position_embeddings": self.whole("max_position_embeddings"),
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
        }

    def same_window(self, default: int | None) -> tuple[int | None, ...]:
        """The same `sliding_window` for all layers; null for none, the default where it is left out."""
        layers = self.whole("num_hidden_layers")
        if "sliding_window" in self._fields and self._fields["sliding_window"] is None:
            return (None,) * layers
        return (
            None if self.get("sliding_window", default) is None else self.whole("sliding_window", default),
        ) * layers

    def windows(self, default_types: Sequence[str]) -> tuple[int | None, ...]:
        """How far each layer sees, from `layer_types`, or those given where the config has none."""
        types, layers = self.get("layer_types", default_types), self.whole("num_hidden_layers")
        if len(types) != layers:
            raise ValueError(f"layer_types in config.json: has {len(types)} entries, must have {layers}")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                supported = "'full_attention' or 'sliding_attention'"
                raise ValueError(
                    f"layer_types in config.json: {kind!r} is not supported; supported is {supported}"
                )
        return tuple(self.whole("sliding_window") if kind == "sliding_attention" else None for kind in types)

    def rope_parameters(self) -> dict[str, Any]:
        """`rope_scaling`, or `rope_parameters` (transformers 5), as the config has them."""
        return dict(self.get("rope_scaling", None) or self.get("rope_parameters", {}))

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        partial: bool = False,
        original: int | None = None,
    ) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

        Args:
            theta: the family's default for `rope_theta`.
            partial: whether the family may rotate only a part of each head.
            original: the family's default for `original_max_position_embeddings`.
        """
        parameters = self.rope_parameters()
        parameters.setdefault("rope_theta", self.number("rope_theta", theta))
        parameters.setdefault("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        if not partial and parameters["partial_rotary_factor"] != 1.0:
            value = parameters["partial_rotary_factor"]
            raise ValueError(
                f"partial_rotary_factor={value!r} in config.json: not supported; supported is 1.0"
            )
        # A field of its own comes before one among the parameters, as in transformers.
        original = self.get("original_max_position_embeddings", original)
        if original is not None:
            parameters["original_max_position_embeddings"] = original
        return self.rope_of(parameters, head_dim)

    def rope_of(self, parameters: Mapping[str, Any], head_dim: int) -> Rope:
        """The rotary embedding of some `rope_parameters`."""
        limit = self.whole("max_position_embeddings")
        longest = limit if self.max_model_len is None else self.max_model_len
        return read_rope(parameters, head_dim, limit, longest)


def resolve_dtype(hf: Mapping[str, Any], dtype: str = "auto") -> jnp.dtype:
    """The dtype of weights and activations; "auto" is the checkpoint's own, and float32 if it names none.

    Raises:
        ValueError: the checkpoint names one that models do not run in.
    """
    named = [
        config.get(key) for config in (hf, hf.get("text_config") or {}) for key in ("dtype", "torch_dtype")
    ]
    own = next((str(name).removeprefix("torch.") for name in named if name), "float32")
    name = own if dtype == "auto" else dtype
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r}: must be one of 'float32', 'bfloat16', 'float16'; give dtype=...")
    return jnp.dtype(name)
