"""The pool of pages: how many hold each, and which freed ones can be found again by what they hold."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from operator import not_

NULL_PAGE = 0
"""Stands in page tables where there is no page. It is never handed out."""

Key = tuple[int, bytes]
"""What a page holds: its group, and the digest of all tokens up to its last (see `prefix.py`)."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How full pools are, run by run of neighbouring pages.

    run: pages of a run; the last one may have fewer.
    used, cached: for each run how many of its pages are in that state; the others are free.
    """

    run: int
    used: tuple[int, ...]
    cached: tuple[int, ...]

    @classmethod
    def of(cls, pools: Iterable["PagePool"], most_runs: int) -> "Occupancy":
        """How full each of at most `most_runs` runs of pages is, for a picture; pools follow one another.

        Another thread may ask: it holds no lock and works on copies, so that a page which changes hands just
        then may be counted in its old state. 65,536 pages take 2 ms.
        """
        references: list[int] = []
        keys: list[Key | None] = []
        for pool in pools:
            references += pool._references[1:]
            keys += pool._keys[1:]
        run = -(-len(references) // most_runs)
        used, cached = [], []
        for begin in range(0, len(references), run):
            holders = references[begin : begin + run]
            idle = list(compress(keys[begin : begin + run], map(not_, holders)))
            used.append(len(holders) - len(idle))
            cached.append(len(idle) - idle.count(None))
        return cls(run, tuple(used), tuple(cached))


class PagePool:
    """Page ids with reference counts.

    Every page but the null page is in one of three states, whose counts always add up to `num_pages - 1`:

    - used: one table or more holds it;
    - cached: nobody holds it, but its key is known and it can be acquired again;
    - free: nobody holds it and nobody could find it.

    Free pages are handed out first, then cached ones, the one released longest ago first.
    """

    def __init__(self, num_pages: int) -> None:
        """Makes a pool of pages 0 to `num_pages - 1`, all free.

        Raises:
            ValueError: fewer than two pages: the null page alone can hold nothing.
        """
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: must be at least 2, the null page and one to use")
        self._references = [0] * num_pages
        self._keys: list[Key | None] = [None] * num_pages
        self._found: dict[Key, int] = {}
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_pages(self) -> int:
        """Pages that can be used: all but the null page."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now, free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def references(self, page: int) -> int:
        """How many tables hold the page."""
        return self._references[page]

    def key(self, page: int) -> Key | None:
        """What the page can be found by, or None."""
        return self._keys[page]

    def find(self, key: Key) -> int | None:
        """The page that holds what `key` names, or None. The page may be used or cached."""
        return self._found.get(key)

    def allocate(self, count: int) -> list[int]:
        """Takes pages, each with one reference. Cached pages that are taken can no longer be found.

        Raises:
            RuntimeError: fewer are available; nothing is taken.
        """
        if count > self.num_available:
            raise RuntimeError(f"{count} pages wanted, {self.num_available} of {self.num_pages} available")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def acquire(self, page: int) -> None:
        """Adds a reference to a page that is used or cached.

        Raises:
            ValueError: the page is free, so nobody can know what it holds.
        """
        if self._references[page] == 0:
            if page not in self._cached:
                raise ValueError(f"page {page} is neither used nor cached: it cannot be shared")
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Takes one reference away. With the last one the page becomes cached, or free if it has no key.

        Raises:
            ValueError: nobody holds the page.
        """
        if self._references[page] == 0:
            raise ValueError(f"page {page} is not held by anybody: released twice?")
        self._references[page] -= 1
        if self._references[page] == 0:
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def register(self, page: int, key: Key) -> None:
        """Makes a used page findable. If another page holds the same, that one stays the known one.

        Raises:
            ValueError: the page is not used, or already has another key.
        """
        if self._references[page] == 0 or self._keys[page] not in (None, key):
            raise ValueError(f"page {page} cannot be registered: not used, or it holds something else")
        if key not in self._found:
            self._found[key] = page
            self._keys[page] = key

    def forget_cached(self) -> None:
        """Turns every cached page into a free one. Pages in use keep their keys."""
        for page in self._cached:
            self._forget(page)
            self._free.append(page)
        self._cached.clear()

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None, "a cached page has a key"
        del self._found[key]
        self._keys[page] = None
