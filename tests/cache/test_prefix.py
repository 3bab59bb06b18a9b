"""Hash chains, and the longest prefix that groups of several kinds agree on."""

from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.groups import GroupSpec
from jaxllm.cache.prefix import HashChain, longest_hit


def digests(tokens: list[int], salt: str | None = None, page_size: int = 2) -> list[bytes]:
    chain = HashChain(page_size, salt)
    chain.extend(tokens, len(tokens) // page_size)
    return chain.digests


def test_equal_tokens_have_equal_digests() -> None:
    assert digests([1, 2, 3, 4]) == digests([1, 2, 3, 4, 5])
    assert len(set(digests([1, 2, 1, 2, 1, 2]))) == 3, "a page's place is part of its name"


def test_a_digest_speaks_of_all_tokens_before_it() -> None:
    first, second = digests([1, 2, 3, 4]), digests([9, 2, 3, 4])
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_tokens_do_not_run_together() -> None:
    assert digests([1, 256], page_size=2) != digests([257, 0], page_size=2)
    assert digests([2**31, 1]) != digests([1, 2**31])


def test_salts_share_nothing() -> None:
    tokens = [1, 2, 3, 4]
    names = [digests(tokens, salt) for salt in (None, "", "none", "a", "b")]
    assert len({page for chain in names for page in chain}) == 10
    assert digests(tokens, "a") == digests(tokens, "a")


def test_a_chain_grows_as_tokens_come() -> None:
    chain = HashChain(2)
    chain.extend([1, 2, 3], 1)
    chain.extend([1, 2, 3, 4, 5, 6], 3)
    chain.extend([1, 2, 3, 4, 5, 6], 2)
    assert chain.digests == digests([1, 2, 3, 4, 5, 6])


def test_a_sliding_group_needs_its_last_window_only() -> None:
    groups = (GroupSpec(None, (0,)), GroupSpec(4, (1,)))
    known = {(0, column) for column in range(6)} | {(1, 2), (1, 3), (1, 5)}
    # Six pages are in the full group. At 6 the next token, at 12, sees positions 9 to 11: columns 4 and 5.
    assert longest_hit(6, groups, 2, lambda g, c: (g, c) in known) == 4
    assert longest_hit(3, groups, 2, lambda g, c: (g, c) in known) == 0, "at 3 column 1 is missing"


def test_a_model_of_sliding_layers_needs_no_beginning() -> None:
    assert longest_hit(9, (GroupSpec(4, (0,)),), 2, lambda g, c: c in (5, 6)) == 7


@given(
    windows=st.lists(st.sampled_from([None, 1, 2, 3, 5, 8]), min_size=1, max_size=3),
    known=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 9))),
    missing=st.booleans(),
    page=st.sampled_from([1, 2, 4]),
)
def test_it_is_the_longest(
    windows: list[int | None], known: set[tuple[int, int]], missing: bool, page: int
) -> None:
    """Against the definition: the largest h for which each group has all its columns before h."""
    groups = tuple(GroupSpec(window, (0,)) for window in windows)

    def is_cached(group: int, column: int) -> bool:
        return ((group, column) in known) != missing

    valid = [
        hit
        for hit in range(11)
        if all(
            is_cached(g, c)
            for g, s in enumerate(groups)
            for c in range(s.first_column(hit * page, page), hit)
        )
    ]
    assert longest_hit(10, groups, page, is_cached) == max(valid)
