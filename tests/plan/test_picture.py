"""Which replica a chip of the picture belongs to."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxllm.plan.layout import Layout
from jaxllm.plan.picture import _replicas
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
    assert _replicas(cast(Any, SimpleNamespace(layout=layout))) == replicas
