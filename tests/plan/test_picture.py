"""Which replica a chip of the picture belongs to."""

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxllm.plan.layout import Layout
from jaxllm.plan.picture import _owners
from pallas_kernels.targets import Target


@pytest.mark.parametrize(
    ("target", "size", "replicas"),
    [
        ("v5e:2x4", 8, [0] * 8),
        ("v5e:2x4", 4, [0, 0, 1, 1, 0, 0, 1, 1]),
        ("v5e:2x4", 2, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("v5e:2x4", 1, list(range(8))),
        ("v5p:2x2x4", 8, [0, 0, 1, 1] * 4),
        ("h100:4", 2, [0, 0, 1, 1]),
    ],
)
def test_replicas(target: str, size: int, replicas: list[int]) -> None:
    layout = Layout.make(Target.parse(target), size)
    chips = tuple(itertools.product(*map(range, layout.replica.shape)))
    plan = SimpleNamespace(layout=layout, stages=[SimpleNamespace(chips=chips)])
    assert [replica for replica, _ in _owners(cast(Any, plan))] == replicas


def test_stages_of_replicas() -> None:
    """Two stages, each a row of a replica of 2 by 2."""
    layout = Layout.make(Target.parse("v5e:2x4"), 2, pipeline=2)
    stages = [SimpleNamespace(chips=((row, 0), (row, 1))) for row in range(2)]
    owners = _owners(cast(Any, SimpleNamespace(layout=layout, stages=stages)))
    assert owners == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]
