"""Medians, percentiles, and ratios of what was measured side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median with the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default. Raises ValueError without values or outside 0 … 100."""
    if not values:
        raise ValueError("percentile: expected at least one value, got none")
    if not 0 <= percent <= 100:
        raise ValueError(f"percentile: expected 0 … 100, got {percent}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread(values: Sequence[float]) -> Spread:
    return Spread(percentile(values, 50), percentile(values, 10), percentile(values, 90))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Round by round, so that what slows a whole round, a busy neighbour say, cancels. Raises ValueError for unequal lengths."""
    if len(numerators) != len(denominators):
        raise ValueError(
            f"ratios: expected as many rounds of one as of the other, got {len(numerators)} and {len(denominators)}"
        )
    return spread([n / d for n, d in zip(numerators, denominators, strict=True)])
