"""Statistics against simulation, numbers worked out by hand, and scipy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy.stats import rankdata, t, wilcoxon

from nnunetv2_hiendmae.benchmark import statistics
from nnunetv2_hiendmae.benchmark.statistics import bootstrap_interval, holm, wilcoxon_p

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DIFFERENCES: dict[str, tuple[Draw, float]] = {  # with their true mean
    "normal": (lambda r, s: r.normal(0.03, 0.05, s), 0.03),
    "gamma": (lambda r, s: -r.gamma(2, 0.02, s), -0.04),
    "t3": (lambda r, s: 0.02 * r.standard_t(3, s), 0),
    "bounded": (lambda r, s: r.beta(8, 2, s) - r.beta(5, 3, s), 0.8 - 0.625),
    "lognormal 0.5": (lambda r, s: 0.05 * r.lognormal(0, 0.5, s), 0.05 * np.exp(0.125)),
    "lognormal 1": (lambda r, s: 0.05 * r.lognormal(0, 1, s), 0.05 * np.exp(0.5)),
    "half ties": (lambda r, s: r.normal(0.02, 0.04, s) * (r.random(s) < 0.5), 0.01),
    "half ties, skewed": (lambda r, s: r.exponential(0.05, s) * (r.random(s) < 0.5), 0.025),
}


@pytest.mark.parametrize("n", [8, 12, 25])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_intervals_hold_the_mean(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 93 % of simulated samples; of the percentile bootstrap 77 to 92 % do."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1_000)
    draw, true = DIFFERENCES[name]
    statistics.resamples.cache_clear()
    try:
        intervals = [bootstrap_interval(list(d)) for d in draw(np.random.default_rng(0), (1_000, n))]
    finally:
        statistics.resamples.cache_clear()
    assert np.mean([i is not None and i[0] <= true <= i[1] for i in intervals]) >= 0.93


def test_interval_of_many_cases_is_students() -> None:
    """Wider for few cases, never narrower; the same for the same values."""
    for n, most in ((4, 3.5), (12, 1.4), (400, 1.05)):
        d = np.random.default_rng(n).normal(0.2, 1, n)
        low, high = bootstrap_interval(list(d)) or (0, 0)
        half = t.ppf(0.975, n - 1) * d.std(ddof=1) / n**0.5
        assert low <= d.mean() - half and d.mean() + half <= high
        assert high - low < most * 2 * half
        assert (low, high) == bootstrap_interval(list(d))


def test_interval_does_not_depend_on_the_unit() -> None:
    d = np.random.default_rng(3).gamma(2, 1, 9)
    low, high = bootstrap_interval(list(d)) or (0, 0)
    assert bootstrap_interval(list(-100 * d)) == pytest.approx((-100 * high, -100 * low), rel=1e-4)


def test_no_interval_where_nothing_tells_its_width() -> None:
    assert bootstrap_interval([0.5]) is None
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([0.5, 0.5, 0.5]) is None
    assert bootstrap_interval([0.1, 0.1 + 1e-17, 0.3 - 0.2]) is None
    low, high = bootstrap_interval([0.1, 0.2]) or (0, 0)
    assert (low, high) == pytest.approx((0.15 - 12.706 * 0.05, 0.15 + 12.706 * 0.05), abs=1e-3)  # Student's t


def test_wilcoxon_by_hand_and_by_scipy() -> None:
    for n in (5, 12, 30):
        d = np.random.default_rng(n).normal(0.3, 1, n)
        assert wilcoxon_p(list(d)) == pytest.approx(wilcoxon(d, method="exact").pvalue)
    assert wilcoxon_p([1.0, 2.0, 3.0]) == 0.25  # 2 / 2³, the smallest there is for three cases
    assert wilcoxon_p([0.0, 0.0]) == 1.0
    assert wilcoxon_p([0.1]) is None


@pytest.mark.parametrize("d", [[1, 1, 2, -1, 3, 3], [0, 0, 0, 0, 0, 0, 4, 5, 6], [-2, 1, 1, 1, 0, 2, 2, -1, 5, 0]])
def test_wilcoxon_with_ties_is_exact(d: list[int]) -> None:
    """Against every sign that the ranks could have."""
    there = np.array([v for v in d if v])
    ranks = rankdata(abs(there))
    signs = np.array(list(product((0, 1), repeat=len(ranks))))
    sums = signs @ ranks
    smaller = min(ranks[there > 0].sum(), ranks[there < 0].sum())
    assert wilcoxon_p([v / 100 for v in d]) == pytest.approx(min(1.0, 2 * np.mean(sums <= smaller)))


def test_what_the_arithmetic_leaves_is_a_tie() -> None:
    assert wilcoxon_p([1e-17] * 10) == 1.0
    assert wilcoxon_p([0.1 + 0.2 - 0.3, 1e-9, -1e-17, 2e-13] * 3) == 1.0
    noise = [1e-17, -1e-16, 1e-12, -1e-9]
    assert wilcoxon_p([0.1, 0.2, 0.2, -0.1, *noise]) == wilcoxon_p([0.1, 0.2, 0.3 - 0.1, -0.3 + 0.2])


def test_holm_by_hand() -> None:
    # sorted 0.01·4, 0.02·3, 0.03·2 (raised to the one before), 0.6·1
    assert holm([0.03, 0.01, 0.6, 0.02]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([None, 0.04, None]) == [None, 0.04, None]
    assert holm([]) == []
