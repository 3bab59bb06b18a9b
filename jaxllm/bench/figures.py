"""Numbers about numbers: percentiles, medians, and how they are printed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.wording import size

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None if there are no values."""
    if not values:
        return None
    return {"mean": statistics.fmean(values)} | {f"p{p}": percentile(values, p) for p in PERCENTILES}


def spread(values: Sequence[float], *, most: bool) -> dict[str, Any]:
    """Best (the most, or the least), median and all of a figure that was measured several times."""
    best = max(values) if most else min(values)
    return {"best": best, "median": statistics.median(values), "all": list(values)}


def table(figures: Mapping[str, Any], indent: str = "") -> str:
    """Nested figures as lines of a name and a value, for people; those of a name in `_bytes` with units."""
    width = max((len(name) for name in figures), default=0)
    lines = []
    for name, value in figures.items():
        title = name.removesuffix("_bytes").replace("_", " ")
        shown = size if name.endswith("_bytes") else number
        if isinstance(value, Mapping) and any(isinstance(v, Mapping | list) for v in value.values()):
            lines.append(f"{indent}{title}\n{table(_without_lists(value), indent + '  ')}")
        elif isinstance(value, Mapping):
            inner = "  ".join(f"{key} {shown(v)}" for key, v in value.items())
            lines.append(f"{indent}{title:{width}}  {inner}")
        elif not isinstance(value, list):
            lines.append(f"{indent}{title:{width}}  {shown(value)}")
    return "\n".join(lines)


def number(value: Any) -> str:
    """Four digits of a float, all of anything else."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _without_lists(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inner for name, inner in value.items() if not isinstance(inner, list)}
