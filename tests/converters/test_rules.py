"""Tables of rules, and the transforms that they name."""

import numpy as np
import pytest

from converters.rules import (
    Geometry,
    Rule,
    Table,
    conv_output,
    conv_stacked_qkv,
    gate_up,
    key_norm,
    output,
    qkv,
    qkv_bias,
    query_norm,
    stacked_gate_up,
    stacked_qkv,
    transposed,
    unchanged,
    vocabulary,
)

TABLE = Table(
    (
        Rule("embedding.weight", ("model.embed.weight",), unchanged),
        Rule("layers.{}.qkv", tuple(f"model.layers.{{}}.{part}" for part in "qkv"), qkv),
        Rule("head.weight", ("head.weight",), unchanged),
    ),
    ignored=(r"model\.layers\.\d+\.inv_freq",),
    renames=(("model.", "inner.model."), ("model.", "")),
)


@pytest.mark.parametrize("prefix", ["model.", "inner.model.", ""])
def test_every_parameter_gets_its_tensors(prefix: str) -> None:
    tensors = [f"{prefix}layers.{n}.{part}" for n in (0, 10) for part in "vkq"] + [f"{prefix}embed.weight"]
    found = TABLE.assign(["embedding.weight", "layers.0.qkv", "layers.10.qkv"], tensors)
    assert found.missing == found.unread == ()
    assert list(found.origins) == ["embedding.weight", "layers.0.qkv", "layers.10.qkv"]
    assert found.origins["layers.10.qkv"].sources == tuple(f"{prefix}layers.10.{part}" for part in "qkv")


def test_what_does_not_fit_is_listed() -> None:
    tensors = ["model.layers.0.q", "model.layers.0.k", "model.layers.0.inv_freq", "head.weight", "extra"]
    found = TABLE.assign(["layers.0.qkv", "layers.1.unknown"], tensors)
    assert found.origins == {}
    assert found.missing == ("model.layers.0.v", "layers.1.unknown (a parameter that no rule makes)")
    assert found.unread == ("head.weight", "extra")


def numbered(*shape: int) -> np.ndarray:
    """Distinct values that need no rounding."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("copies", [1, 2])
def test_fused_heads_stand_where_attention_reads_them(copies: int) -> None:
    geometry = Geometry(8, 2, 3, vocab_size=5, padded_vocab_size=5, kv_copies=copies)
    q, k, v = numbered(24, 7), 1000 + numbered(6, 7), 2000 + numbered(6, 7)
    x = np.random.RandomState(0).standard_normal(7).astype(np.float32)
    fused = qkv([q, k, v], geometry)
    made = np.einsum("e,ekgd->kgd", x, fused)
    group = 4 // copies
    assert fused.shape == (7, 2 * copies, group + 2, 3)
    np.testing.assert_allclose(made[:, :group].reshape(-1), q @ x, rtol=1e-4)
    for head in range(2 * copies):
        np.testing.assert_allclose(made[head, group], (k @ x).reshape(2, 3)[head // copies], rtol=1e-4)
        np.testing.assert_allclose(made[head, group + 1], (v @ x).reshape(2, 3)[head // copies], rtol=1e-4)
    stacked = np.concatenate([q, k, v])
    np.testing.assert_array_equal(stacked_qkv([stacked], geometry), fused)
    np.testing.assert_array_equal(conv_stacked_qkv([stacked.T], geometry), fused)
    np.testing.assert_array_equal(qkv_bias([q[:, 1], k[:, 1], v[:, 1]], geometry), fused[1])


def test_norms_over_all_heads_are_repeated_as_the_heads_are() -> None:
    geometry = Geometry(8, 2, 3, vocab_size=5, padded_vocab_size=5, kv_copies=2)
    np.testing.assert_array_equal(query_norm([numbered(24)], geometry), numbered(8, 3))
    np.testing.assert_array_equal(key_norm([numbered(6)], geometry), numbered(2, 3)[[0, 0, 1, 1]])


def test_other_forms() -> None:
    geometry = Geometry(2, 1, 3, vocab_size=5, padded_vocab_size=8)
    weight, other = numbered(4, 6), -numbered(4, 6)
    np.testing.assert_array_equal(transposed([weight], geometry), weight.T)
    np.testing.assert_array_equal(output([weight], geometry).reshape(6, 4), weight.T)
    np.testing.assert_array_equal(conv_output([weight.T], geometry).reshape(6, 4), weight.T)
    fused = gate_up([weight, other], geometry)
    np.testing.assert_array_equal(fused, np.stack([weight.T, other.T], axis=1))
    np.testing.assert_array_equal(stacked_gate_up([np.concatenate([weight, other])], geometry), fused)
    table = vocabulary([1 + numbered(5, 2)], geometry)
    assert table.shape == (8, 2)
    assert not table[5:].any()
    assert table[:5].all()
