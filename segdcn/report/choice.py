"""Which images of a split are worth looking at. Legend: N images."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_median_worst(miou: Sequence[float]) -> dict[str, int]:
    """Indices of the best, the median and the worst image; without those that have no figure (NaN).

    The median is the lower one of an even number; of equal figures the first image counts as the worse. Of fewer than
    three images none is named twice.
    """
    order = sorted((value, index) for index, value in enumerate(miou) if not math.isnan(value))
    if not order:
        return {}
    places = {"best": len(order) - 1, "worst": 0, "median": (len(order) - 1) // 2}
    found: dict[str, int] = {}
    for name, place in places.items():
        if order[place][1] not in found.values():
            found[name] = order[place][1]
    return {name: found[name] for name in ("best", "median", "worst") if name in found}


def most_different(first: Sequence[float], other: Sequence[float], count: int) -> list[int]:
    """Indices of the images whose mIoU differs most between two runs, the largest difference first."""
    differences = [(abs(a - b), -index) for index, (a, b) in enumerate(zip(first, other, strict=True))]
    known = sorted((pair for pair in differences if not math.isnan(pair[0])), reverse=True)
    return [-index for _, index in known[:count]]


def spread(total: int, count: int, without: Sequence[int] = ()) -> list[int]:
    """Up to ``count`` indices evenly over 0..total-1, but for those that are chosen already."""
    wanted = min(count, total)
    return [index for index in (number * total // wanted for number in range(wanted)) if index not in without]
