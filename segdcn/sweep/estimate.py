"""Means over seeds and differences paired by seed, with what is known about them: scipy's t interval and t test."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from segdcn.sweep.results import Estimate

CONFIDENCE = 0.95


def mean_over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's t interval; None of no values."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if not _vary(values, values):
        return Estimate(len(values), mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=stats.sem(values))
    return Estimate(len(values), mean, float(low), float(high))


def paired_difference(figures: Mapping[str | None, float], baseline: Mapping[str | None, float]) -> Estimate | None:
    """Mean of ``figures`` - ``baseline`` over the seeds that both have, by the two-sided paired t test.

    Both are seed → figure. None without a common seed.
    """
    pairs = [(figure, baseline[seed]) for seed, figure in figures.items() if seed in baseline]
    if not pairs:
        return None
    differences = [a - b for a, b in pairs]
    mean = statistics.fmean(differences)
    if not _vary(differences, [value for pair in pairs for value in pair]):
        return Estimate(len(pairs), mean)
    test = stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs])
    low, high = test.confidence_interval(CONFIDENCE)
    return Estimate(len(pairs), mean, float(low), float(high), float(test.pvalue))


def _vary(values: Sequence[float], computed_from: Sequence[float]) -> bool:
    """Whether they differ by more than rounding: 0.3 - 0.2 and 0.2 - 0.1 do not."""
    size = max(1.0, *map(abs, computed_from))
    return max(values) - min(values) > 1e-12 * size
