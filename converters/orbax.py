"""Our own checkpoints: a folder with configs, tokenizer files, and the weights as Orbax arrays.

    config.json  generation_config.json  tokenizer files  weights.orbax/

The arrays have the engine's names and forms (`converters.rules`), as one device would hold them: key-value
heads once, the vocabulary without padding. So they go straight from disk into the shards of any mesh; only
where a mesh needs copies of heads or padding does the host see an array.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from converters.checkpoint import WEIGHTS_FOLDER, TensorInfo
from converters.errors import CheckpointError
from converters.safetensors import published_dtype, read_json

CHUNK_BYTES = 32 << 20
"""Largest piece of an array on disk: what a device reads for a shard is rounded up to these."""
FORMAT = "jaxllm_format"
FORMAT_VERSION = 1


class OrbaxCheckpoint:
    """A folder that `save` wrote. Opening it reads the configs and the arrays' shapes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        version = self.config.pop(FORMAT, None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: config.json has {FORMAT}={version!r}, and {FORMAT_VERSION} is what is read; "
                "run `jaxllm convert` again on the original model"
            )
        self.generation_config = read_json(path / "generation_config.json", optional=True)
        self._weights = (path / WEIGHTS_FOLDER).absolute()
        with _explained(path), _checkpointer() as checkpointer:
            metadata = checkpointer.metadata(self._weights).item_metadata.tree
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(info.shape), np.dtype(info.dtype)) for name, info in metadata.items()
        }
        self.dtype = published_dtype(self.config, self.tensors)

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """One array, whole, on the host."""
        args = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype or self.tensors[name].dtype)
        return self._restore({name: args})[name]

    def restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Arrays in the shardings and dtypes asked for, each device reading what it holds.

        Args:
            wanted: by name; the shapes must be those in `tensors`.
        """
        args = {
            name: ocp.ArrayRestoreArgs(
                dtype=target.dtype, sharding=target.sharding, global_shape=target.shape
            )
            for name, target in wanted.items()
        }
        return self._restore(args)

    def _restore(self, args: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
        item = dict.fromkeys(args, 0)
        with _explained(self.path), _checkpointer() as checkpointer:
            return checkpointer.restore(
                self._weights,
                args=ocp.args.PyTreeRestore(item=item, restore_args=dict(args), partial_restore=True),
            )

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is kept open."""


def save(
    path: Path,
    arrays: Mapping[str, jax.Array],
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: Any = None,
) -> None:
    """Writes a checkpoint folder; it appears only when it is complete.

    Args:
        path: the folder to make; its parent must exist.
        arrays: by the engine's names, in the form that one device would hold.
        config: as in `config.json`.
        generation_config: as in `generation_config.json`; may be empty.
        tokenizer: anything with transformers' `save_pretrained`.

    Raises:
        CheckpointError: `path` is there already and not an empty folder, or has no parent.
    """
    path = path.absolute()
    refuse_to_overwrite(path)
    # Beside the target, so that the last step is a rename; a failure leaves nothing behind.
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _checkpointer() as checkpointer:
            save_args = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
            checkpointer.save(
                draft / WEIGHTS_FOLDER, args=ocp.args.PyTreeSave(item=dict(arrays), save_args=save_args)
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        _write_json(draft / "config.json", {**config, FORMAT: FORMAT_VERSION})
        if generation_config:
            _write_json(draft / "generation_config.json", generation_config)
        draft.chmod(0o755)
        if path.exists():
            path.rmdir()
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def refuse_to_overwrite(path: Path) -> None:
    """Checks that a checkpoint folder can be made at `path`.

    Raises:
        CheckpointError: something is there already, or the parent folder is not.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty folder; choose another, or delete it first")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; make it first")


def _checkpointer() -> ocp.Checkpointer:
    # Compression saves a fifth of the space of bfloat16 weights, and makes writing them three times as slow.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """The folder and the fix belong in the message."""
    try:
        yield
    except Exception as error:  # Orbax raises whatever it meets, down to plain Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        folder = path / WEIGHTS_FOLDER
        raise CheckpointError(f"{folder} cannot be read ({reason}); convert the model again") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
