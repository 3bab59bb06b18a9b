"""Reading Hugging Face configs, whichever version of transformers wrote them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.layers.mlp import find_activation
from jaxllm.layers.rope import Rope
from jaxllm.models.rope_scaling import read_rope

_REQUIRED = object()


class Fields:
    """A config's fields by name, with defaults as transformers has them, and what is not supported refused.

    A field that is null counts as left out, as it does in transformers.
    """

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._fields = hf
        self.only("quantization_config", None)

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value.

        Raises:
            ValueError: the config does not have it, and there is no default.
        """
        value = self._fields.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{name}: missing in the model's config.json, which must give it")
        return default

    def whole(self, name: str, default: Any = _REQUIRED) -> int:
        """A count of at least one."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name}={value!r}: must be a whole number of at least 1 in the model's config.json"
            )
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise ValueError(f"{name}={value!r}: must be a finite number in the model's config.json")
        return float(value)

    def cap(self, name: str, default: float | None) -> float | None:
        """A soft cap: a positive number, or null for none."""
        value = self._fields.get(name, default)
        if value is None:
            return None
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"{name}={value!r}: must be a positive number or null in the model's config.json"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: must be true or false in the model's config.json")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a field that is there with any other value than `allowed`.

        Raises:
            ValueError: it is; the message names the values that are supported.
        """
        value = self._fields.get(name)
        if value is not None and value not in allowed:
            values = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{name}={value!r}: not supported; supported is {values}")

    def activation(self, name: str, default: str) -> str:
        """The name of a function that feed-forward layers know."""
        value = self.get(name, default)
        try:
            find_activation(value)
        except ValueError as error:
            raise ValueError(str(error).replace("hidden_act=", f"{name}=", 1)) from None
        return value

    def windows(self, layer_types: Sequence[str]) -> tuple[int | None, ...]:
        """How far each layer sees, from the config's `layer_types`, or those given where it has none."""
        types = self.get("layer_types", layer_types)
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(
                f"layer_types: {sorted(unknown)[0]!r} is not supported; supported are 'full_attention' and "
                "'sliding_attention'"
            )
        window = self.whole("sliding_window") if "sliding_attention" in types else None
        return tuple(window if kind == "sliding_attention" else None for kind in types)

    def rope(
        self,
        *,
        default_theta: float = 10000.0,
        layer_type: str | None = None,
        max_model_len: int | None = None,
        default_original: int | None = None,
    ) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

        Args:
            layer_type: where the config has parameters for each type of layer, which to take.
            max_model_len: see `CausalLM.read_config`.
            default_original: `original_max_position_embeddings` where the config does not give it.
        """
        parameters = dict(self.get("rope_scaling", None) or self.get("rope_parameters", {}))
        if layer_type is not None and layer_type in parameters:
            parameters = dict(parameters[layer_type] or {})
        parameters.setdefault("rope_theta", self.number("rope_theta", default_theta))
        parameters.setdefault("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        # A field of its own comes before one among the parameters, as in transformers.
        original = self.get("original_max_position_embeddings", default_original)
        if original is not None:
            parameters["original_max_position_embeddings"] = original
        limit = self.whole("max_position_embeddings")
        return read_rope(
            parameters, self.head_dim(), limit, limit if max_model_len is None else max_model_len
        )

    def head_dim(self, default: int | None = None) -> int:
        """Width of a head."""
        if self.get("head_dim", default) is not None:
            return self.whole("head_dim", default)
        size, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        if size % heads:
            raise ValueError(f"hidden_size={size}: must be a multiple of num_attention_heads={heads}")
        return size // heads

    def sizes(self) -> dict[str, Any]:
        """The fields of `DecoderConfig` that all families read alike."""
        heads = self.whole("num_attention_heads")
        return {
            "vocab_size": self.whole("vocab_size"),
            "hidden_size": self.whole("hidden_size"),
            "intermediate_size": self.whole("intermediate_size"),
            "num_layers": self.whole("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.whole("num_key_value_heads", heads),
            "head_dim": self.head_dim(),
            "max_position_embeddings": self.whole("max_position_embeddings"),
        }


def resolve_dtype(hf: Mapping[str, Any], dtype: str = "auto") -> jnp.dtype:
    """The dtype of weights and activations; "auto" is the checkpoint's own, and float32 if it names none.

    Raises:
        ValueError: the checkpoint names one that models do not run in.
    """
    text = hf.get("text_config") or {}
    named = (
        hf.get("dtype") or hf.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "float32"
    )
    name = str(named).removeprefix("torch.") if dtype == "auto" else dtype
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r}: must be one of 'float32', 'bfloat16', 'float16'; give dtype=")
    return jnp.dtype(name)
