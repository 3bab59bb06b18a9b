"""The pool of pages: states, references, and which page is taken next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.pages import NULL_PAGE, Occupancy, PagePool


def key(number: int) -> tuple[int, bytes]:
    return 0, bytes([number])


def cached_pool(count: int) -> PagePool:
    """A pool whose pages 1, 2, ... are all cached, released in this order, under keys 1, 2, ..."""
    pool = PagePool(count + 1)
    for page in pool.allocate(count):
        pool.register(page, key(page))
        pool.release(page)
    return pool


def test_hands_out_all_pages_but_the_null_page() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_pages, pool.num_free, pool.num_cached, pool.num_used) == (4, 0, 0, 4)


@pytest.mark.parametrize(
    ("most_runs", "run", "used", "cached"),
    [
        (100, 1, (0, 0, 1, 1, 1, 0, 0), (1, 1, 0, 0, 0, 0, 0)),
        (3, 3, (1, 2, 0), (2, 0, 0)),
        (1, 7, (3,), (2,)),
    ],
)
def test_occupancy_counts_runs_of_pages(
    most_runs: int, run: int, used: tuple[int, ...], cached: tuple[int, ...]
) -> None:
    pool = PagePool(8)
    for page in pool.allocate(5):  # 1 to 5, of which 1 and 2 become cached, and 3 has a key, too
        if page <= 3:
            pool.register(page, key(page))
        if page <= 2:
            pool.release(page)
    assert Occupancy.of([pool], most_runs) == Occupancy(run, used, cached)


def test_too_many_pages_wanted_takes_none() -> None:
    pool = PagePool(5)
    with pytest.raises(RuntimeError, match="5 pages wanted, 4 of 4 available"):
        pool.allocate(5)
    assert pool.num_free == 4


def test_needs_a_page_beside_the_null_page() -> None:
    with pytest.raises(ValueError, match="num_pages=1"):
        PagePool(1)


def test_a_page_is_held_until_its_last_reference_goes() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.acquire(page)
    pool.release(page)
    assert (pool.references(page), pool.num_used) == (1, 1)
    pool.release(page)
    assert (pool.references(page), pool.num_used, pool.num_free) == (0, 0, 2)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(page)


def test_released_pages_with_a_key_can_be_found_and_shared() -> None:
    pool = cached_pool(2)
    assert (pool.num_cached, pool.num_free, pool.find(key(1))) == (2, 0, 1)
    pool.acquire(1)
    assert (pool.num_cached, pool.num_used, pool.references(1), pool.find(key(1))) == (1, 1, 1, 1)


def test_a_free_page_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="neither used nor cached"):
        PagePool(3).acquire(1)


def test_free_pages_go_before_cached_ones_and_those_by_age() -> None:
    pool = cached_pool(4)
    pool.acquire(1)  # used again and released again: now the youngest
    pool.release(1)
    assert pool.allocate(2) == [2, 3]
    assert [pool.find(key(n)) for n in (1, 2, 3, 4)] == [1, None, None, 4]
    pool.release(3)  # it lost its key with its content
    assert (pool.num_free, pool.allocate(1)) == (1, [3])


def test_of_two_pages_with_equal_content_the_first_stays_known() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(2)
    pool.register(first, key(1))
    pool.register(second, key(1))
    assert (pool.find(key(1)), pool.key(second)) == (first, None)
    pool.release(second)
    assert (pool.num_free, pool.find(key(1))) == (1, first)


def test_a_page_keeps_its_key_while_it_is_used() -> None:
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    pool.register(page, key(1))
    with pytest.raises(ValueError, match="holds something else"):
        pool.register(page, key(2))
    with pytest.raises(ValueError, match="not used"):
        pool.register(2 if page == 1 else 1, key(2))


def test_forgetting_frees_cached_pages_alone() -> None:
    pool = cached_pool(3)
    pool.acquire(2)
    pool.forget_cached()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 0, 1)
    assert [pool.find(key(n)) for n in (1, 2, 3)] == [None, 2, None]


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "share", "release", "register", "forget"]), st.integers(0, 9))
    )
)
def test_the_three_states_always_add_up(history: list[tuple[str, int]]) -> None:
    pool, held = PagePool(7), []
    for action, number in history:
        page = held[number % len(held)] if held else NULL_PAGE
        if action == "take" and pool.num_available:
            held += pool.allocate(1)
        elif action == "share" and (found := pool.find(key(number))) is not None:
            pool.acquire(found)
            held.append(found)
        elif action == "release" and held:
            held.remove(page)
            pool.release(page)
        elif action == "register" and held and pool.key(page) is None:
            pool.register(page, key(number))
        elif action == "forget":
            pool.forget_cached()
        assert pool.num_used == len(set(held))
        assert pool.num_free + pool.num_cached + pool.num_used == pool.num_pages == 6
        assert all(pool.references(page) == held.count(page) for page in range(7))
        for n in range(10):
            found = pool.find(key(n))
            assert found is None or pool.key(found) == key(n)
