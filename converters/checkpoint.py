"""One way to open every kind of checkpoint: a Hugging Face repo, a folder, a GGUF file, an Orbax folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from converters.errors import CheckpointError
from converters.on_disk import find_on_disk

if TYPE_CHECKING:
    import jax

WeightFormat = Literal["auto", "safetensors", "gguf", "orbax"]

WEIGHTS_FOLDER = "weights.orbax"
"""What marks a folder as an Orbax checkpoint of ours."""


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """As `Checkpoint.read` returns it when no other dtype is asked for; float32 for quantized blocks."""


class Checkpoint(Protocol):
    """An open model: its configs, and its tensors by name, read one at a time."""

    config: dict[str, Any]
    """As in a Hugging Face `config.json`."""
    generation_config: dict[str, Any]
    """As in `generation_config.json`; empty if there is none."""
    path: Path
    """The folder or file that the weights and the tokenizer are read from."""
    tensors: Mapping[str, TensorInfo]
    """By the names that transformers gives them (of a `ShardedCheckpoint`: that the engine does)."""
    dtype: np.dtype[Any]
    """What `dtype="auto"` means: the dtype that the model was published in."""

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """One tensor: a read-only view of the file where that is possible, else a new array.

        Args:
            name: a key of `tensors`.
            dtype: what to cast to (default: as `tensors` says).
        """
        ...

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took. Views of it stay valid."""
        ...

    def close(self) -> None:
        """Lets go of the files. Views returned by `read` stay valid until they are dropped."""
        ...


@runtime_checkable
class ShardedCheckpoint(Checkpoint, Protocol):
    """A checkpoint of parameters in the engine's names and forms, which devices read straight from disk."""

    def restore(self, wanted: "Mapping[str, jax.ShapeDtypeStruct]") -> "dict[str, jax.Array]":
        """Arrays in the shardings and dtypes asked for, each device reading what it holds.

        Args:
            wanted: by name; the shapes must be those in `tensors`.
        """
        ...


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    load_format: WeightFormat = "auto",
    local_files_only: bool = False,
) -> Checkpoint:
    """Opens a model by name, path or repo id. Nothing but headers is read yet.

    Args:
        model: `smollm2-135m-instruct` (the demo model), a folder, a GGUF file, a Hugging Face repo id,
            or `owner/repo:file.gguf` for one GGUF file of a repo.
        revision: branch, tag or commit, for repo ids.
        cache_dir: where downloads are kept (default: huggingface_hub's own folder).
        token: access token for gated repos (default: the one huggingface_hub has stored).
        load_format: what the weights must be; "auto" takes what is there.
        local_files_only: take repos from the cache and never use the network.

    Raises:
        CheckpointError: nothing there, not a model, a format other than `load_format`, or a damaged file.
    """
    # Libraries are imported when they are needed: Orbax alone takes seconds, the hub's a tenth of one.
    path = find_on_disk(model)
    if path is None:
        from converters.hub import locate

        path = locate(
            model, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    found = weight_format(path)
    if load_format not in ("auto", found):
        raise CheckpointError(
            f"load_format={load_format!r}: {path} holds {found} weights; use 'auto' or {found!r}"
        )
    if found == "gguf":
        from converters.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if found == "orbax":
        from converters.orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    from converters.dequantized import dequantized
    from converters.safetensors import SafetensorsCheckpoint

    return dequantized(SafetensorsCheckpoint(path))


def weight_format(path: Path) -> Literal["safetensors", "gguf", "orbax"]:
    """What kind of weights a file or folder holds.

    Raises:
        CheckpointError: none that we read; the message says what is there instead.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise CheckpointError(f"{path}: give the folder that holds the model, or a .gguf file")
    if (path / WEIGHTS_FOLDER).is_dir():
        return "orbax"
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return "safetensors"
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_files:
        raise CheckpointError(
            f"{path} holds GGUF files: give one of them as the model: {', '.join(gguf_files)}"
        )
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in path.glob(f"*.{suffix}"))
    if pickles:
        raise CheckpointError(f"{path}: {pickle_advice(pickles)}")
    raise CheckpointError(f"{path} is not a model: it has no .safetensors, no .gguf and no {WEIGHTS_FOLDER}/")


def pickle_advice(names: list[str]) -> str:
    """Why files such as `pytorch_model.bin` are not loaded, and what to do about it."""
    return (
        f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} are pickles, which can run code and are "
        "not loaded; convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST, safe_serialization=True)"
    )
