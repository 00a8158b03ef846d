"""Statistics of paired differences: bootstrap intervals, Wilcoxon's test, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import wilcoxon

RESAMPLES = 10_000
MIN_CASES = 2
"""Fewer cases have no interval and no test."""


def bootstrap_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Percentile interval of the mean over 10,000 seeded resamples of the cases; None for fewer than two."""
    if len(values) < MIN_CASES:
        return None
    array = np.asarray(values, float)
    means = array[np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilcoxon_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; 1 if no case differs, None for fewer than two cases."""
    if len(differences) < MIN_CASES:
        return None
    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over all given p values, in their order; None stays None and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected
