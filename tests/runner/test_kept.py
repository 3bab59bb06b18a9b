"""Programs that are kept on disk: found again by those that mean the same, and never used when broken."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.stages import Compiled, Lowered

from jaxllm.runner.kept import KeptPrograms

SHAPE = jax.ShapeDtypeStruct((300,), jnp.float32)


pytestmark = pytest.mark.usefixtures("no_jax_cache")


def lower(factor: float) -> Lowered:
    """Scales its argument, in place."""
    return jax.jit(lambda x: {"scaled": x * factor, "sum": (x + factor).sum()}, donate_argnums=0).lower(SHAPE)


def store(folder: Path, identity: str = "this", **options: int) -> KeptPrograms:
    return KeptPrograms(folder, identity, jax.devices()[:1], **options)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)


def test_what_was_kept_runs_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "programs"
    store(folder).compile(("scale", 3), lower(3.0))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o077 for file in files(folder)] == [0]
    later = store(folder)
    program = later.load(("scale", 3))
    assert later.num_loaded == 1
    assert program is not None
    x = jnp.arange(300.0)
    found = program(x)
    np.testing.assert_array_equal(found["scaled"], 3 * np.arange(300.0))
    assert x.is_deleted(), "donation is lost"


def test_others_are_not_found(tmp_path: Path) -> None:
    store(tmp_path).compile("scale", lower(3.0))
    assert store(tmp_path).load("other") is None
    assert store(tmp_path, "that").load("scale") is None


@pytest.mark.parametrize("damage", ["cut off", "a byte changed", "empty", "another format"])
def test_a_damaged_file_is_compiled_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path).compile("scale", lower(3.0))
    [file] = files(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "a byte changed":
        content[len(content) // 2] ^= 1
    elif damage == "another format":
        content = bytearray(b"jaxllm program 0\n") + content[17:]
    else:
        content = content[: len(content) // 2 if damage == "cut off" else 0]
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path).load("scale") is None
    assert "cannot be used (the file is damaged); compiling it" in caplog.text
    assert files(tmp_path) == []


def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path).compile("scale", lower(3.0))
    tmp_path.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        suspicious = store(tmp_path)
    assert suspicious.load("scale") is None
    suspicious.compile("other", lower(2.0))
    assert len(files(tmp_path)) == 1
    assert f"others can write to {tmp_path}" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        nowhere = store(tmp_path / "file" / "programs")
    assert nowhere.load("scale") is None
    assert nowhere.compile("scale", lower(3.0))(jnp.ones(300))["sum"] == 1200
    assert "compiled programs are not kept" in caplog.text


def test_the_oldest_are_deleted(tmp_path: Path) -> None:
    store(tmp_path).compile(0, lower(0.0))
    size = files(tmp_path)[0].stat().st_size
    small = store(tmp_path, max_bytes=int(3.5 * size))
    for key in (1, 2):
        small.compile(key, lower(float(key)))
    for age, file in enumerate(files(tmp_path)):
        os.utime(file, (1000 + age, 1000 + age))
    assert small.load(0) is not None  # and now it is the youngest
    small.compile(3, lower(3.0))
    assert [key for key in range(4) if small.load(key) is not None] == [0, 2, 3]


class Patched:
    """Something happens while a program is compiled."""

    def __init__(self, lowered: Lowered, happens: Callable[[], None]) -> None:
        self._lowered = lowered
        self._happens = happens

    def compile(self) -> Compiled:
        compiled = self._lowered.compile()
        self._happens()
        return compiled


def test_only_what_was_compiled_just_now_is_kept(tmp_path: Path) -> None:
    """XLA on CPU writes a program that it has read without its code."""
    store(tmp_path).compile(0, Patched(lower(0.0), lambda: None))
    assert len(files(tmp_path)) == 1
    lowered = lower(1.0)
    store(tmp_path).compile(1, lowered)
    assert len(files(tmp_path)) == 2
    store(tmp_path).compile("found in memory", lowered)
    hit = partial(jax.monitoring.record_event, "/jax/compilation_cache/cache_hits")
    store(tmp_path).compile("found on disk", Patched(lower(2.0), hit))
    store(tmp_path).compile("nobody hears", Patched(lower(3.0), jax.monitoring.clear_event_listeners))
    assert len(files(tmp_path)) == 2
