"""Groups of layers that share page tables: full attention, and sliding windows of each size.

Layers of one kind need pages for the same positions, so one table serves them all. All groups draw ids from
one pool of pages, and memory moves freely between full and sliding layers: pool array j holds the j-th layer
of every group, and page 7 is either the full group's page 7 in all arrays or a sliding group's.
(The scheme of vLLM's hybrid KV cache manager.)
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Layers of one kind.

    window: a token at position p sees positions j with p - window < j <= p; None: all up to its own.
    layers: indices of the model's layers, in order; the j-th keeps its keys and values in pool array j.
    """

    window: int | None
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1, or None for full attention")

    def first_column(self, start: int, page_size: int) -> int:
        """First column that a query at position `start`, or any later one, still looks at."""
        if self.window is None:
            return 0
        return max(0, start - self.window + 1) // page_size

    def most_columns(self, num_columns: int, page_size: int) -> int:
        """Most pages that a request which grows to `num_columns` columns, token by token, holds at any time.

        A window's positions touch one page more than their number fills when they begin inside a page.
        """
        if self.window is None:
            return num_columns
        return min(num_columns, (self.window + page_size - 2) // page_size + 1)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Where each layer's keys and values live.

    slots: for each layer, from the first on that it is for, (its group, its pool array).
    """

    groups: tuple[GroupSpec, ...]
    slots: tuple[tuple[int, int], ...]

    @property
    def num_pools(self) -> int:
        """Pool arrays to make: as many as the largest group has layers."""
        return max(len(group.layers) for group in self.groups)

    def part(self, layers: range) -> "CacheLayout":
        """Where some of the layers, in order, live when the others live elsewhere.

        The groups are the same, some of them perhaps without layers: they share page tables everywhere, and
        the pages of an id are as many as there are parts.
        """
        groups = tuple(
            GroupSpec(group.window, tuple(layer for layer in group.layers if layer in layers))
            for group in self.groups
        )
        slots = [(g, groups[g].layers.index(layer)) for layer in layers for g in (self.slots[layer][0],)]
        return CacheLayout(groups, tuple(slots))


def group_layers(windows: Sequence[int | None]) -> CacheLayout:
    """Groups a model's layers by window, in groups of (nearly) equal size.

    Args:
        windows: for each layer its sliding window in tokens, or None for full attention.

    A group shorter than the others leaves its share of the last pool arrays unused, so the size is that of
    the smallest kind and larger kinds are cut into several groups: 4 full and 22 sliding layers become one
    group of 4 and six of 4, 4, 4, 4, 3 and 3. Kinds whose sizes differ by less than a quarter get one group
    each: there the padding costs less than the tables of many groups.

    Raises:
        ValueError: no layers, or a window below 1.
    """
    if not windows:
        raise ValueError("windows is empty: a model has at least one layer")
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    smallest, largest = min(map(len, kinds.values())), max(map(len, kinds.values()))
    size = largest if largest < 1.25 * smallest else smallest
    groups = tuple(
        GroupSpec(window, tuple(layers[part::parts]))
        for window, layers in kinds.items()
        for parts in (-(-len(layers) // size),)
        for part in range(parts)
    )
    slots = {layer: (g, pool) for g, group in enumerate(groups) for pool, layer in enumerate(group.layers)}
    return CacheLayout(groups, tuple(slots[layer] for layer in range(len(windows))))
