"""Prefix caching: names for full pages that say all tokens up to their last, and the longest known prefix."""

import hashlib
from array import array
from collections.abc import Callable, Sequence

from jaxllm.cache.groups import GroupSpec


class HashChain:
    """Digests of one request's full pages, each made from its parent's digest and its own tokens.

    Equal digests mean equal tokens from the first to the page's last, and an equal salt. sha256, because a
    collision would show one user's text to another.
    """

    __slots__ = ("_page_size", "_root", "digests")

    def __init__(self, page_size: int, salt: str | None = None) -> None:
        """Begins a chain. Chains with different salts share nothing; None differs from any text."""
        self._page_size = page_size
        self._root = hashlib.sha256(b"none" if salt is None else b"salt" + salt.encode()).digest()
        self.digests: list[bytes] = []

    def extend(self, token_ids: Sequence[int], num_pages: int) -> None:
        """Makes the chain at least `num_pages` long. `token_ids` are the request's, from its first on."""
        for page in range(len(self.digests), num_pages):
            tokens = array("q", token_ids[page * self._page_size : (page + 1) * self._page_size])
            parent = self.digests[-1] if self.digests else self._root
            self.digests.append(hashlib.sha256(parent + tokens.tobytes()).digest())


def longest_hit(
    num_pages: int, groups: Sequence[GroupSpec], page_size: int, is_cached: Callable[[int, int], bool]
) -> int:
    """Most leading pages, up to `num_pages`, after which a request can go on without computing them.

    Args:
        is_cached: whether the page of (group, column) is known.

    A full group needs all of these pages, a sliding group those that the next token's window touches.
    """
    full = [g for g, group in enumerate(groups) if group.window is None]
    hit = 0
    while hit < num_pages and all(is_cached(g, hit) for g in full):
        hit += 1
    while True:
        before = hit
        for g, group in enumerate(groups):
            if group.window is not None:
                hit = _shrink(hit, group, page_size, lambda column, g=g: is_cached(g, column))
        if hit == before:
            return hit


def _shrink(hit: int, group: GroupSpec, page_size: int, is_cached: Callable[[int], bool]) -> int:
    """Longest prefix, up to `hit` pages, whose window is known. Each column is looked at once: a gap at
    column c lies in the window of every prefix from c + 1 to `hit`, so the next to try is c."""
    column = hit - 1
    while column >= group.first_column(hit * page_size, page_size):
        if not is_cached(column):
            hit = column
        column -= 1
    return hit
