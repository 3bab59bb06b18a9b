"""Small GGUF files for tests, written as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 2, 64, 4, 2, 16, 96, 128
QUERY, KEY = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


def write(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
    settings: Mapping[str, Any] = {},
    tokenizer: Mapping[str, Any] = {},
) -> Path:
    """Writes tensors under llama.cpp's names; `settings` are keys of the architecture, without its name."""
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
    }
    for key, value in {**sizes, **settings}.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in tokenizer.items():
        _add(writer, f"tokenizer.{key}", value)
    for name, (values, kind) in tensors.items():
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A Llama's tensors under transformers' names, tied embeddings."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_proj.weight": (QUERY, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (KEY, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (KEY, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, QUERY),
            f"{at}.mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.up_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, MLP),
        }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of Llama's queries and keys."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def to_llama_cpp(architecture: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames and changes tensors as llama.cpp's converter does, by the name map of the package `gguf`."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    made = {}
    for name, values in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if architecture in ("llama", "smollm3") and ".attn_q." in stored:
            values = permute(values, HEADS)
        elif architecture in ("llama", "smollm3") and ".attn_k." in stored:
            values = permute(values, KV_HEADS)
        elif architecture.startswith("gemma") and stored.endswith("norm.weight"):
            values = values + np.float32(1)
        elif architecture == "gpt2" and any(
            p in name for p in ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        ):
            values = values.T
        made[stored] = values
    return made


def write_llama(path: Path, tensors: Mapping[str, np.ndarray] | None = None, **options: Any) -> Path:
    """A small Llama in float32, or with the matrices in another type (`kind`)."""
    kind = options.pop("kind", gguf.GGMLQuantizationType.F32)
    stored = to_llama_cpp("llama", llama_tensors() if tensors is None else tensors)
    plain = gguf.GGMLQuantizationType.F32
    typed = {name: (values, kind if values.ndim == 2 else plain) for name, values in stored.items()}
    return write(path, "llama", typed, **options)
