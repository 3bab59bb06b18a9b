"""Groups of layers: which layers share tables, and which columns a window touches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.groups import GroupSpec, group_layers


def test_layers_of_one_kind_are_one_group() -> None:
    layout = group_layers([None] * 30)
    assert layout.groups == (GroupSpec(None, tuple(range(30))),)
    assert layout.slots == tuple((0, layer) for layer in range(30))
    assert layout.num_pools == 30


def test_alternating_kinds_share_pools() -> None:
    """Gemma 2: every second layer slides."""
    layout = group_layers([4096, None] * 13)
    assert [(g.window, len(g.layers)) for g in layout.groups] == [(4096, 13), (None, 13)]
    assert layout.num_pools == 13
    assert layout.slots[:4] == ((0, 0), (1, 0), (0, 1), (1, 1))


def test_a_larger_kind_is_cut_into_groups_of_the_smaller_ones_size() -> None:
    """Gemma 3 1B: 22 sliding layers beside 4 full ones."""
    layout = group_layers([None if layer % 6 == 5 else 512 for layer in range(26)])
    assert [(g.window, len(g.layers)) for g in layout.groups] == [
        *[(512, size) for size in (4, 4, 4, 4, 3, 3)],
        (None, 4),
    ]
    assert layout.num_pools == 4


def test_kinds_of_nearly_equal_size_are_padded_instead() -> None:
    layout = group_layers([None] * 9 + [128] * 10)
    assert [len(g.layers) for g in layout.groups] == [9, 10]
    assert layout.num_pools == 10


@given(st.lists(st.sampled_from([None, 16, 4096]), min_size=1, max_size=40))
def test_each_layer_has_a_slot_of_its_own(windows: list[int | None]) -> None:
    layout = group_layers(windows)
    assert len(set(layout.slots)) == len(windows)
    for layer, (group, pool) in enumerate(layout.slots):
        assert layout.groups[group].window == windows[layer]
        assert layout.groups[group].layers[pool] == layer
        assert pool < layout.num_pools


def test_refuses_what_is_no_model() -> None:
    with pytest.raises(ValueError, match="windows is empty"):
        group_layers([])
    with pytest.raises(ValueError, match="window=0"):
        group_layers([0])


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 16]), st.integers(0, 100))
def test_the_first_column_is_the_one_of_the_oldest_visible_position(
    window: int, page: int, start: int
) -> None:
    visible = [j for j in range(start + 1) if start - window < j]
    assert GroupSpec(window, (0,)).first_column(start, page) == visible[0] // page
    assert GroupSpec(None, (0,)).first_column(start, page) == 0


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 16]))
def test_a_window_touches_no_more_columns_than_stated(window: int, page: int) -> None:
    spec = GroupSpec(window, (0,))
    touched = [p // page - spec.first_column(p, page) + 1 for p in range(200)]
    assert spec.most_columns(200 // page, page) == max(touched)
    assert spec.most_columns(1, page) == 1
    assert GroupSpec(None, (0,)).most_columns(9, page) == 9
