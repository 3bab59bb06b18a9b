"""The plan of sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.runner.buckets import SMALLEST, Buckets


@given(tokens=st.integers(1, 5000), rows=st.integers(1, 300), growth=st.sampled_from([2, 4]), data=st.data())
def test_every_step_fits(tokens: int, rows: int, growth: int, data: st.DataObject) -> None:
    buckets = Buckets.up_to(tokens, rows, growth)
    wanted = data.draw(st.integers(1, tokens))
    bucket = buckets.fit(wanted)
    assert bucket.tokens >= wanted
    assert bucket.rows >= min(wanted, rows)
    assert bucket.sampled >= bucket.rows
    assert all(size.rows >= SMALLEST for size in buckets.sizes)
    smaller = [size for size in buckets.sizes if size.tokens < bucket.tokens]
    assert all(size.tokens < wanted for size in smaller)
    assert bucket.tokens <= max(growth * wanted, SMALLEST)


def test_few_programs() -> None:
    buckets = Buckets.up_to(2048, 256)
    assert [size.tokens for size in buckets.sizes] == [2**i for i in range(1, 12)]
    assert buckets.sampled == (8, 32, 128, 256)


@given(tokens=st.integers(1, 600), rows=st.integers(1, 100), data=st.data())
def test_few_rows_of_many_tokens(tokens: int, rows: int, data: st.DataObject) -> None:
    """A prompt's step computes few logits, and one of all rows finds its place as well."""
    buckets = Buckets.up_to(512, 64, with_few_rows=True)
    tokens, rows = min(tokens, 512), min(rows, tokens, 64, 512)
    bucket = buckets.fit(tokens, rows)
    assert bucket in buckets.sizes
    assert bucket.tokens == Buckets.up_to(512, 64).fit(tokens).tokens
    assert rows <= bucket.rows <= bucket.sampled
    assert bucket.sampled == 8 or rows > 8 or bucket.tokens <= 32
    assert buckets.fit(tokens).rows >= min(tokens, 64)
    assert buckets.largest == Buckets.up_to(512, 64).largest


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="num_tokens=65: a step holds at most 64"):
        Buckets.up_to(64, 8).fit(65)
