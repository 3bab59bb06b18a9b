"""The cache as the scheduler uses it: prefixes, growth, windows, counts."""

import pytest

from jaxllm.cache.groups import GroupSpec
from jaxllm.cache.manager import CacheManager
from jaxllm.cache.pages import NULL_PAGE
from jaxllm.cache.prefix import HashChain
from jaxllm.cache.tables import PageTables

FULL, SLIDING = GroupSpec(None, (0,)), GroupSpec(6, (1,))
TOKENS = list(range(40))


def manager(*groups: GroupSpec, num_pages: int = 50, caching: bool = True) -> CacheManager:
    return CacheManager(groups, num_pages=num_pages, page_size=4, enable_prefix_caching=caching)


def computed(cache: CacheManager, chain: HashChain, tokens: list[int], chunk: int = 4) -> PageTables:
    """Tables of a request that has computed all these tokens, in chunks."""
    tables = cache.no_tables()
    for start in range(0, len(tokens), chunk):
        cache.advance(tables, chain, tokens, start)
        cache.extend(tables, min(start + chunk, len(tokens)))
    return tables


def test_tables_grow_by_whole_columns_of_all_groups() -> None:
    cache = manager(FULL, SLIDING)
    tables = cache.no_tables()
    new = cache.extend(tables, 5)
    assert [len(pages) for pages in new] == [2, 2]
    assert len({page for pages in new for page in pages}) == 4, "groups share no page"
    assert tables.groups == [list(pages) for pages in new]
    assert cache.extend(tables, 8) == ()
    assert [len(pages) for pages in cache.extend(tables, 9)] == [1, 1]


def test_growing_beyond_the_pool_changes_nothing() -> None:
    cache = manager(FULL, num_pages=3)
    tables = cache.no_tables()
    cache.extend(tables, 4)
    with pytest.raises(RuntimeError, match="2 pages wanted, 1 of 2 available"):
        cache.extend(tables, 12)
    assert tables.num_columns == 1


def test_a_sliding_group_gives_back_what_left_its_window() -> None:
    cache = manager(FULL, SLIDING)
    chain = cache.chain(None)
    tables = computed(cache, chain, TOKENS[:20])
    # Its last chunk began at 16; the query there sees 11 to 16.
    assert [page == NULL_PAGE for page in tables.groups[1]] == [True, True, False, False, False]
    assert NULL_PAGE not in tables.groups[0]
    assert cache.pool.num_used == 5 + 3
    cache.advance(tables, chain, TOKENS, 20)
    assert [page == NULL_PAGE for page in tables.groups[1]] == [True, True, True, False, False]


def test_a_finished_request_is_found_up_to_its_last_full_page() -> None:
    cache = manager(FULL)
    chain = cache.chain(None)
    tables = computed(cache, chain, TOKENS[:15])
    pages = list(tables.groups[0])
    cache.close(tables, chain, TOKENS[:15], 15)
    assert (cache.pool.num_cached, cache.pool.num_used) == (3, 0)
    found = cache.find_prefix(cache.chain(None), TOKENS)
    assert (found.num_tokens, found.tables, found.num_idle) == (12, (tuple(pages[:3]),), 3)


def test_a_prompt_that_is_all_cached_still_computes_a_token() -> None:
    cache = manager(FULL)
    chain = cache.chain(None)
    cache.close(computed(cache, chain, TOKENS[:12]), chain, TOKENS[:12], 12)
    assert cache.find_prefix(cache.chain(None), TOKENS[:12]).num_tokens == 8
    assert cache.find_prefix(cache.chain(None), TOKENS[:13]).num_tokens == 12


def test_pages_of_steps_not_planned_yet_are_not_found() -> None:
    cache = manager(FULL)
    chain = cache.chain(None)
    tables = cache.no_tables()
    cache.extend(tables, 8)
    assert cache.find_prefix(cache.chain(None), TOKENS).num_tokens == 0
    cache.advance(tables, chain, TOKENS, 8)
    assert cache.find_prefix(cache.chain(None), TOKENS).num_tokens == 8


def test_pages_whose_tokens_the_host_has_not_read_are_not_found() -> None:
    cache = manager(FULL)
    chain = cache.chain(None)
    tables = cache.no_tables()
    cache.extend(tables, 8)
    cache.close(tables, chain, TOKENS[:7], 8)
    assert cache.find_prefix(cache.chain(None), TOKENS).num_tokens == 4


def test_a_prefix_is_found_while_its_owner_runs_and_shared() -> None:
    cache = manager(FULL)
    chain = cache.chain(None)
    owner = computed(cache, chain, TOKENS[:9])
    cache.advance(owner, chain, TOKENS, 9)
    found = cache.find_prefix(cache.chain(None), TOKENS)
    assert (found.num_tokens, found.num_idle) == (8, 0)
    other = cache.open(found)
    assert other.groups[0] == owner.groups[0][:2]
    assert cache.pool.references(owner.groups[0][0]) == 2
    cache.close(owner, chain, TOKENS[:9], 9)
    assert cache.pool.references(other.groups[0][0]) == 1


def test_a_prefix_in_mixed_groups_has_the_last_window_of_the_sliding_ones() -> None:
    cache = manager(FULL, SLIDING)
    chain = cache.chain(None)
    tables = computed(cache, chain, TOKENS)
    cache.close(tables, chain, TOKENS, 40)
    found = cache.find_prefix(cache.chain(None), [*TOKENS, 0])
    assert found.num_tokens == 40
    assert [page == NULL_PAGE for page in found.tables[1]] == [True] * 8 + [False] * 2
    # A shorter prompt finds sliding pages too: they were released while their owner ran, and are still there.
    shorter = cache.find_prefix(cache.chain(None), [*TOKENS[:20], 99])
    assert (shorter.num_tokens, shorter.num_idle) == (20, 5 + 2)


def test_a_prefix_loses_its_end_before_its_beginning() -> None:
    cache = manager(FULL, num_pages=6)
    chain = cache.chain(None)
    cache.close(computed(cache, chain, TOKENS[:20]), chain, TOKENS[:20], 20)
    cache.extend(cache.no_tables(), 8)
    assert cache.find_prefix(cache.chain(None), TOKENS).num_tokens == 12


def test_salts_do_not_meet() -> None:
    cache = manager(FULL)
    chain = cache.chain("a")
    cache.close(computed(cache, chain, TOKENS[:8]), chain, TOKENS[:8], 8)
    assert cache.find_prefix(cache.chain("b"), TOKENS).num_tokens == 0
    assert cache.find_prefix(cache.chain(None), TOKENS).num_tokens == 0
    assert cache.find_prefix(cache.chain("a"), TOKENS).num_tokens == 8


def test_without_prefix_caching_pages_become_free() -> None:
    cache = manager(FULL, caching=False)
    chain = cache.chain(None)
    cache.close(computed(cache, chain, TOKENS[:8]), chain, TOKENS[:8], 8)
    assert (cache.pool.num_cached, cache.pool.num_free) == (0, 49)
    assert cache.find_prefix(cache.chain(None), TOKENS).num_tokens == 0
    assert chain.digests == []


def test_reset_forgets_all_unless_pages_are_held() -> None:
    cache = manager(FULL)
    chain = cache.chain(None)
    tables = computed(cache, chain, TOKENS[:8])
    assert not cache.reset_prefix_cache()
    cache.close(tables, chain, TOKENS[:8], 8)
    assert cache.reset_prefix_cache()
    assert cache.pool.num_free == 49
    assert cache.find_prefix(cache.chain(None), TOKENS).num_tokens == 0


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 13, 16, 17, 100])
@pytest.mark.parametrize("total", [1, 4, 5, 17, 40])
def test_growth_is_what_a_request_holds_at_most(window: int, total: int) -> None:
    cache = manager(FULL, GroupSpec(window, (1,)))
    chain, tables, most = cache.chain(None), cache.no_tables(), 0
    for start in range(total):
        cache.advance(tables, chain, TOKENS, start)
        still_needed = cache.growth(total, start, tables.num_columns)
        assert cache.pool.num_used + still_needed <= cache.growth(total)
        cache.extend(tables, start + 1)
        most = max(most, cache.pool.num_used)
    assert most == cache.growth(total)
    assert cache.growth(total, total, tables.num_columns) == 0


def test_capacity_counts_columns_of_all_groups() -> None:
    cache = manager(FULL, SLIDING, SLIDING)
    assert cache.capacity(num_columns=2, num_pages=8) == (2 + 2) * 4


def test_statistics() -> None:
    cache = manager(FULL, num_pages=11)
    chain = cache.chain(None)
    cache.close(computed(cache, chain, TOKENS[:8]), chain, TOKENS[:8], 8)
    cache.count_query(20, cache.find_prefix(cache.chain(None), TOKENS[:20]))
    tables = cache.no_tables()
    cache.extend(tables, 9)
    stats = cache.stats()
    assert (stats.num_pages, stats.num_free, stats.num_cached, stats.num_used) == (10, 5, 2, 3)
    assert (stats.usage, stats.prefix_queries, stats.prefix_hits, stats.hit_rate) == (0.3, 20, 8, 0.4)
    assert cache.unused_slots(tables, 9) == 3


def test_refuses_what_can_hold_nothing() -> None:
    with pytest.raises(ValueError, match="groups is empty"):
        manager()
    with pytest.raises(ValueError, match="num_pages=1"):
        manager(FULL, num_pages=1)
    with pytest.raises(ValueError, match="page_size=0"):
        CacheManager((FULL,), num_pages=9, page_size=0)
