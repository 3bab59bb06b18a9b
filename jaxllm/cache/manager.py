"""The cache as the scheduler sees it: prefixes to find, tables to grow, pages to count."""

import itertools
from collections.abc import Container, Iterable, Sequence
from dataclasses import astuple, dataclass

from jaxllm.cache.groups import GroupSpec
from jaxllm.cache.pages import NULL_PAGE, PagePool
from jaxllm.cache.prefix import HashChain, longest_hit
from jaxllm.cache.tables import PageTables


@dataclass(frozen=True, slots=True)
class Prefix:
    """The leading tokens of a request that the cache holds.

    tables: for each group the pages, with the null page where its window has passed.
    num_idle: how many of the pages nobody holds at the moment, so that taking them makes fewer available.
    """

    num_tokens: int
    tables: tuple[tuple[int, ...], ...]
    num_idle: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Pages by state, and how often prompts were found.

    num_pages is num_free + num_cached + num_used. Queries and hits count the prompts' tokens.
    """

    num_pages: int
    num_free: int
    num_cached: int
    num_used: int
    prefix_queries: int
    prefix_hits: int

    @classmethod
    def together(cls, parts: Iterable["CacheStats"]) -> "CacheStats":
        """The counts of several pools, added up."""
        return cls(*map(sum, zip(*map(astuple, parts), strict=True)))

    @property
    def usage(self) -> float:
        """Share of the pages that requests hold."""
        return self.num_used / self.num_pages

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that did not have to be computed."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0


class CacheManager:
    """Gives pages to requests and remembers what they hold.

    It moves ids about and touches no memory. What it says of a page's content is true for steps that run
    after all steps already planned; a device runs steps in order, so a page may be freed and given away while
    the last step that uses it still runs.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        *,
        num_pages: int,
        page_size: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        """Makes an empty cache.

        Args:
            num_pages: length of the pool arrays, the null page included.

        Raises:
            ValueError: no groups, fewer than two pages, or pages of no tokens.
        """
        if not groups:
            raise ValueError("groups is empty: a model has at least one group of layers")
        if page_size < 1:
            raise ValueError(f"page_size={page_size}: must be at least 1")
        self.groups = tuple(groups)
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = PagePool(num_pages)
        self._sliding = [(g, group) for g, group in enumerate(self.groups) if group.window is not None]
        self._prefix_queries = 0
        self._prefix_hits = 0

    # Counting: nothing below changes anything.

    def num_columns(self, num_tokens: int) -> int:
        """Columns that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def capacity(self, num_columns: int, num_pages: int) -> int:
        """Tokens that tables of `num_columns` columns can hold after growing by at most `num_pages` pages."""
        return (num_columns + num_pages // len(self.groups)) * self.page_size

    def growth(self, num_tokens: int, start: int = 0, num_columns: int = 0) -> int:
        """Pages that a request still needs, beyond those it holds, to get to `num_tokens` tokens.

        Args:
            start: tokens computed so far.
            num_columns: columns of its tables.

        Sliding groups give pages back as they go, so this is for steps of one token; a longer step can use
        more, and `capacity` bounds it by what there is.
        """
        most = self.num_columns(num_tokens)
        total = 0
        for group in self.groups:
            first = group.first_column(start, self.page_size)
            total += max(0, group.most_columns(most - first, self.page_size) - (num_columns - first))
        return total

    def unused_slots(self, tables: PageTables, num_tokens: int) -> int:
        """Slots of held pages in which no token has been put."""
        return (tables.num_columns * self.page_size - num_tokens) * len(self.groups)

    def stats(self) -> CacheStats:
        pool = self.pool
        return CacheStats(
            pool.num_pages,
            pool.num_free,
            pool.num_cached,
            pool.num_used,
            self._prefix_queries,
            self._prefix_hits,
        )

    def clear(self) -> None:
        """Forgets who holds which page: all are free. What has been counted stays."""
        self.pool = PagePool(self.pool.num_pages + 1)  # the null page is not counted

    # Prefixes

    def chain(self, salt: str | None) -> HashChain:
        """A new request's hash chain. Only requests with equal salts share pages."""
        return HashChain(self.page_size, salt)

    def find_prefix(self, chain: HashChain, token_ids: Sequence[int]) -> Prefix:
        """The longest prefix of `token_ids` that is held, in full pages and short of the last token.

        The last token is always left to compute: its output is what the next token is sampled from.
        """
        if not self.enable_prefix_caching:
            return self.no_prefix()
        most = (len(token_ids) - 1) // self.page_size
        chain.extend(token_ids, most)
        find, digests = self.pool.find, chain.digests
        hit = longest_hit(most, self.groups, self.page_size, lambda g, c: find((g, digests[c])) is not None)
        tables, num_idle = [], 0
        for g, group in enumerate(self.groups):
            first = group.first_column(hit * self.page_size, self.page_size)
            pages = [find((g, digest)) for digest in digests[first:hit]]
            num_idle += sum(self.pool.references(page) == 0 for page in pages if page is not None)
            tables.append((*[NULL_PAGE] * first, *[page for page in pages if page is not None]))
        return Prefix(hit * self.page_size, tuple(tables), num_idle)

    def num_coming(
        self, prefix: Prefix, chain: HashChain, token_ids: Sequence[int], names: Container[bytes]
    ) -> int:
        """Tokens after a prefix just found whose pages are among `names`, short of the last token."""
        if not names or not self.enable_prefix_caching:
            return 0
        first, most = prefix.num_tokens // self.page_size, (len(token_ids) - 1) // self.page_size
        chain.extend(token_ids, most)
        there = itertools.takewhile(names.__contains__, chain.digests[first:most])
        return sum(1 for _ in there) * self.page_size

    def names(
        self, chain: HashChain, token_ids: Sequence[int], start: int, num_tokens: int
    ) -> Sequence[bytes]:
        """Names of the pages that become full with `num_tokens` known tokens from `start` on."""
        first, end = start // self.page_size, min(start + num_tokens, len(token_ids)) // self.page_size
        if first >= end or not self.enable_prefix_caching:
            return ()
        chain.extend(token_ids, end)
        return chain.digests[first:end]

    def no_prefix(self) -> Prefix:
        """The empty prefix, for a request that must compute all its tokens."""
        return Prefix(0, ((),) * len(self.groups), 0)

    def count_query(self, num_tokens: int, prefix: Prefix) -> None:
        """Enters a prompt of `num_tokens` tokens and what was found of it in the statistics."""
        self._prefix_queries += num_tokens
        self._prefix_hits += prefix.num_tokens

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages. False, and nothing happens, while requests hold pages."""
        if self.pool.num_used:
            return False
        self.pool.forget_cached()
        return True

    # A running request's tables

    def no_tables(self) -> PageTables:
        """Tables without columns, as a request has that holds no pages."""
        return self.open(self.no_prefix())

    def open(self, prefix: Prefix) -> PageTables:
        """Tables that begin with a prefix just found. They hold references to its pages until `close`."""
        for table in prefix.tables:
            for page in table:
                if page != NULL_PAGE:
                    self.pool.acquire(page)
        columns = prefix.num_tokens // self.page_size
        first_held = [group.first_column(prefix.num_tokens, self.page_size) for group in self.groups]
        return PageTables([list(table) for table in prefix.tables], first_held, columns)

    def extend(self, tables: PageTables, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Appends columns until the tables hold `num_tokens` tokens; the new pages of each group, () if none.

        Raises:
            RuntimeError: there are not enough pages; nothing is changed.
        """
        count = self.num_columns(num_tokens) - tables.num_columns
        if count <= 0:
            return ()
        pages = self.pool.allocate(count * len(self.groups))
        new = tuple(tuple(pages[g * count : (g + 1) * count]) for g in range(len(self.groups)))
        for table, added in zip(tables.groups, new, strict=True):
            table.extend(added)
        return new

    def advance(self, tables: PageTables, chain: HashChain, token_ids: Sequence[int], start: int) -> None:
        """Says that tokens before `start` belong to steps already planned, and later queries begin there.

        Their full pages can now be found by others, and pages that no window reaches any more are released.
        """
        self._register(tables, chain, token_ids, start)
        for g, group in self._sliding:
            table, first = tables.groups[g], group.first_column(start, self.page_size)
            for column in range(tables.first_held[g], first):
                self.pool.release(table[column])
                table[column] = NULL_PAGE
            tables.first_held[g] = max(first, tables.first_held[g])

    def close(self, tables: PageTables, chain: HashChain, token_ids: Sequence[int], num_tokens: int) -> None:
        """Gives all pages back, after `num_tokens` tokens in steps already planned.

        The full ones can be found until they are needed for something else.
        Pages are released from the last to the first, so that a prefix loses its end before its beginning.
        """
        self._register(tables, chain, token_ids, num_tokens)
        for page in tables.held():
            self.pool.release(page)

    def _register(
        self, tables: PageTables, chain: HashChain, token_ids: Sequence[int], num_tokens: int
    ) -> None:
        """Enters full pages of computed tokens in the prefix cache, as far as the host knows the tokens."""
        full = min(num_tokens, len(token_ids)) // self.page_size
        if not self.enable_prefix_caching or full <= tables.num_registered:
            return
        chain.extend(token_ids, full)
        for column in range(tables.num_registered, full):
            for g, table in enumerate(tables.groups):
                if table[column] != NULL_PAGE:
                    self.pool.register(table[column], (g, chain.digests[column]))
        tables.num_registered = full
