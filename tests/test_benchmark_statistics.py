"""Statistics against numbers worked out by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, wilcoxon

from nnunetv2_hiendmae.benchmark.statistics import bootstrap_interval, holm, wilcoxon_p


def test_holm_by_hand() -> None:
    # sorted 0.01·4, 0.02·3, 0.03·2 (raised to the one before), 0.6·1
    assert holm([0.03, 0.01, 0.6, 0.02]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([None, 0.04, None]) == [None, 0.04, None]
    assert holm([]) == []


def test_wilcoxon_is_scipys() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 12)
    assert wilcoxon_p(list(d)) == wilcoxon(d).pvalue
    assert wilcoxon_p([1.0, 2.0, 3.0]) == 0.25  # 2 / 2³, the smallest there is for three cases
    assert wilcoxon_p([0.0, 0.0]) == 1.0
    assert wilcoxon_p([0.1]) is None


def test_bootstrap_agrees_with_scipy_and_repeats() -> None:
    d = np.random.default_rng(1).normal(0.2, 1, 40)
    mine = bootstrap_interval(list(d))
    theirs = bootstrap((d,), np.mean, n_resamples=10_000, method="percentile").confidence_interval
    assert mine == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert mine == bootstrap_interval(list(d))
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)
    assert bootstrap_interval([0.5]) is None
