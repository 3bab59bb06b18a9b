"""What programs depend on, as text."""

import dataclasses
import enum
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.rope import Rope
from jaxllm.models.llama import Llama
from jaxllm.runner import identity
from jaxllm.runner.identity import CannotIdentifyError, code_hash, describe
from jaxllm.runner.lowering import Sizes
from pallas_kernels.paged_attention import as_backend

SIZES = Sizes(4, 32, 64, 4, 2, 20)


class Mine(enum.Enum):
    ONE = 1


def test_plain_data() -> None:
    assert describe((1, "a", None, {"b": 2.5, "a": [True]})) == describe(
        [1, "a", None, {"a": [True], "b": 2.5}]
    )
    assert describe(SIZES) == describe(dataclasses.replace(SIZES))
    assert describe(np.arange(2000)) == describe(np.arange(2000))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, "1"),
        (True, 1),
        ((1, 2), (2, 1)),
        ({"a": 1}, {"a": 2}),
        (SIZES, dataclasses.replace(SIZES, page_size=8)),
        (Rope((1.0, 0.5)), Rope((1.0, 0.25))),
        (np.arange(2000), np.where(np.arange(2000) == 1000, 0, np.arange(2000))),
        (np.zeros(4, np.float32), np.zeros(4, np.int32)),
        (jnp.dtype("bfloat16"), jnp.dtype("float32")),
        (as_backend("cpu").attend, as_backend("xla").attend),
        (partial(describe, 1), partial(describe, 2)),
    ],
)
def test_different_things_read_differently(one: object, other: object) -> None:
    assert describe(one) == describe(one)
    assert describe(one) != describe(other)


@pytest.mark.parametrize(
    "value", [lambda x: x, Mine.ONE, object(), Mine, partial(lambda x: x), {"a": {1, 2}}]
)
def test_code_from_elsewhere_is_refused(value: object) -> None:
    with pytest.raises(CannotIdentifyError):
        describe(value)


def test_code_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Llama
    monkeypatch.setattr("jaxllm.models.llama.Llama", type("Llama", (Llama,), {}))
    with pytest.raises(CannotIdentifyError, match="not there under its name"):
        describe(original)


def test_the_code_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_of_a_test").mkdir()
    file = tmp_path / "package_of_a_test" / "__init__.py"
    file.write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(identity, "PACKAGES", ("package_of_a_test",))
    with pytest.raises(CannotIdentifyError, match="has been changed since this process began"):
        code_hash()
    monkeypatch.setattr(identity, "_process_begin", lambda: file.stat().st_mtime + 1)
    first = code_hash()
    assert code_hash() == first
    file.write_text("x = 2\n")
    assert code_hash() != first
    monkeypatch.setattr(identity, "PACKAGES", ("no_such_package",))
    with pytest.raises(CannotIdentifyError, match="not in files"):
        code_hash()
