"""The report's tables, as plain strings, so that Markdown, CSV and HTML show the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median

from nnunetv2_hiendmae.benchmark.collect import METRICS, Result
from nnunetv2_hiendmae.benchmark.grid import Grid
from nnunetv2_hiendmae.benchmark.statistics import MIN_CASES, TIE_DIGITS, bootstrap_interval, holm, wilcoxon_p
from nnunetv2_hiendmae.benchmark.surface import ABSENT, ONE_SIDED

MEAN = "mean"
Cell = tuple[str, str, int | str]
"""Data set, configuration, label budget."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the report and of the CSV file of that name."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm minus the first arm, paired by case."""

    cell: Cell
    arm: str
    metric: str
    differences: list[float]
    """One a case: of ``case_means`` over the runs that both have finished."""
    pairs: int
    """Runs that both arms have finished."""
    planned: int
    """Runs of an arm in the grid."""
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None

    @property
    def difference(self) -> float | None:
        """Mean over the cases; None if no run is there in both arms."""
        return fmean(self.differences) if self.differences else None


def cells(grid: Grid) -> list[Cell]:
    """Data sets × configurations × label budgets."""
    return [(d, c, n) for d in grid.datasets for c in grid.configurations for n in grid.labels]


def of_cell(results: Iterable[Result], cell: Cell, arm: str) -> list[Result]:
    """The runs of one arm in a cell: one for each fold and seed."""
    return [r for r in results if (r.run.dataset, r.run.configuration, r.run.labels) == cell and r.run.arm.name == arm]


def organs_of(results: Iterable[Result], dataset: str) -> list[str]:
    """Organs of a data set, in its own order."""
    return list(dict.fromkeys(s.organ for r in results if r.run.dataset == dataset for s in r.scores))


def case_means(runs: Iterable[Result], metric: str, organ: str = MEAN) -> dict[str, float]:
    """One number a case, the unit of every mean, interval and test of the report.

    Args:
        runs: their cases may be the same or others: a case of several runs, whether of label subsets or of folds, is
            no new patient, and counts once with the mean over these runs.
        metric: of ``METRICS``.
        organ: or the mean over all organs of the case.
    """
    found: dict[str, list[float]] = {}
    for run in runs:
        of_run: dict[str, list[float]] = {}
        for s in run.scores:
            if organ in (MEAN, s.organ):
                of_run.setdefault(s.case, []).append(getattr(s, metric))
        for case, values in of_run.items():
            found.setdefault(case, []).append(fmean(values))
    return {case: fmean(values) for case, values in found.items()}


def mean_over_cases(runs: Iterable[Result], metric: str, organ: str = MEAN) -> float | None:
    """Mean of ``case_means`` over the finished runs; None if there is none."""
    means = case_means([r for r in runs if r.status == "finished"], metric, organ)
    return fmean(means.values()) if means else None


def number(value: float, metric: str) -> str:
    """Three digits for shares, one for millimetres."""
    return f"{value:.{1 if metric == 'hd95' else 3}f}"


def cell_text(runs: list[Result], metric: str, organ: str) -> str:
    """Mean over the finished runs, their range, and how many of the runs they are."""
    done = [r for r in runs if r.status == "finished"]
    means = [v for r in done if (v := mean_over_cases([r], metric, organ)) is not None]
    whole = mean_over_cases(done, metric, organ)
    if whole is None:
        return f"missing (0/{len(runs)} runs)"
    text = number(whole, metric)
    if len(means) > 1:
        text += f" ({number(min(means), metric)}–{number(max(means), metric)})"
    outcomes = [s.outcome for r in done for s in r.scores if organ in (MEAN, s.organ)]
    for outcome in (ONE_SIDED, ABSENT):
        if outcome in outcomes and (metric == "hd95" or outcome == ABSENT):
            text += f", {outcomes.count(outcome)} of {len(outcomes)} {outcome}"
    return text + (f", {len(done)}/{len(runs)} runs" if len(done) < len(runs) else "")


TITLES = {
    "dice": "Dice",
    "nsd": "Surface Dice (NSD) at {tolerance:g} mm",
    "hd95": "95 % Hausdorff distance (HD95) in mm, lower is better",
}
NOTES = {
    "dice": "Mean over the organs of a case, then over the label subsets and folds that have the case, then over cases "
    "(in brackets: range of the means of single runs). An organ that is missed or invented altogether has 0; one that "
    "reference and prediction both lack has 1 (nnU-Net's summary.json leaves it out), and is counted as absent.",
    "nsd": "As Dice.",
    "hd95": "As Dice, but a missed or invented organ has the worst distance possible, the diagonal of the image in mm, "
    "and is counted; one that both lack has 0.",
}


def metric_table(grid: Grid, results: list[Result], metric: str, tolerance: float) -> Table:
    """Arms × (cell, organ); the mean first."""
    rows = []
    for cell in cells(grid):
        for organ in [MEAN, *organs_of(results, cell[0])]:
            values = [cell_text(of_cell(results, cell, arm.name), metric, organ) for arm in grid.arms]
            rows.append([cell[0], cell[1], str(cell[2]), organ, *values])
    title = TITLES[metric].format(tolerance=tolerance)
    header = ["data set", "configuration", "labels", "organ", *(arm.name for arm in grid.arms)]
    return Table(name=metric, title=title, note=NOTES[metric], header=header, rows=rows)


def pairs_of(first: list[Result], other: list[Result]) -> list[tuple[Result, Result]]:
    """Runs of two arms on the same fold and label subset that are both finished."""
    partner = {(r.run.fold, r.run.seed): r for r in first if r.status == "finished"}
    both = [(partner.get((r.run.fold, r.run.seed)), r) for r in other if r.status == "finished"]
    return [(a, b) for a, b in both if a is not None]


def paired_differences(pairs: list[tuple[Result, Result]], metric: str) -> list[float]:
    """Differences by case, see ``Comparison``."""
    first, other = (case_means(runs, metric) for runs in ([a for a, _ in pairs], [b for _, b in pairs]))
    return [other[case] - first[case] for case in first]


def comparisons(grid: Grid, results: list[Result]) -> list[Comparison]:
    """Every arm with the first, for every metric; Holm's correction over all arms and cells of a metric."""
    made = []
    for metric in METRICS:
        found = [
            (cell, arm.name, pairs, paired_differences(pairs, metric))
            for cell in cells(grid)
            for arm in grid.arms[1:]
            for pairs in [pairs_of(of_cell(results, cell, grid.arms[0].name), of_cell(results, cell, arm.name))]
        ]
        p_values = [wilcoxon_p(d) for *_, d in found]
        for (cell, arm_name, pairs, d), p, p_holm in zip(found, p_values, holm(p_values), strict=True):
            made.append(
                Comparison(
                    cell=cell,
                    arm=arm_name,
                    metric=metric,
                    pairs=len(pairs),
                    planned=len(of_cell(results, cell, arm_name)),
                    differences=d,
                    interval=bootstrap_interval(d),
                    p=p,
                    p_holm=p_holm,
                )
            )
    return made


COMPARISON_NOTE = (
    "Differences of the means above, paired by case, over the runs that both arms have finished. The case is the "
    "unit; its organs, label subsets and folds are averaged first. So the interval says how it might be with other "
    "patients, not with another training. 95 % interval: at each end the wider of Student's t and of the bootstrap-t "
    "of 10,000 resamples, its quantiles expanded for few cases (Hesterberg 2015). In simulations it held the true "
    "mean in 93 % or more with 8, 12 and 25 cases, in 86 % with 4 of which half are tied. Exact "
    f"two-sided Wilcoxon signed-rank test; differences under {10**-TIE_DIGITS / 2:.0e} are ties, and with n cases that "
    "differ the smallest possible p is 2 / 2ⁿ. Holm's correction: one family a metric, all its rows in this table, "
    "whatever their data set, configuration, label budget and arm."
)


def comparison_table(grid: Grid, made: list[Comparison]) -> Table:
    """One row a comparison."""
    rows = []
    for c in made:
        values = ["missing", "", "", ""]
        if c.difference is not None:
            values = [signed(c.difference, c.metric), interval_text(c), share(c.p), share(c.p_holm)]
        paired = f"{len(c.differences)}" + (f", {c.pairs}/{c.planned} runs" if c.pairs < c.planned else "")
        rows.append([c.cell[0], c.cell[1], str(c.cell[2]), c.metric, c.arm, paired, *values])
    header = ["data set", "configuration", "labels", "metric", "arm", "cases", "difference", "95 % interval", "p"]
    title = f"Paired differences from {grid.arms[0].name}"
    return Table(name="comparisons", title=title, note=COMPARISON_NOTE, header=[*header, "p (Holm)"], rows=rows)


def interval_text(c: Comparison) -> str:
    """The interval, or why there is none."""
    if c.interval:
        return " … ".join(signed(v, c.metric) for v in c.interval)
    return "too few cases" if len(c.differences) < MIN_CASES else "all cases alike"


def signed(value: float, metric: str) -> str:
    """A difference, with its sign, which ties have not."""
    return f"{round(value, TIE_DIGITS) + 0.0:+.{1 if metric == 'hd95' else 3}f}"


def share(p: float | None) -> str:
    """A p value for reading."""
    return "–" if p is None else f"{p:.3g}"


def cost_table(grid: Grid, results: list[Result]) -> Table:
    """Accuracy beside cost, medians over an arm's finished and recorded runs."""
    rows = []
    for dataset in grid.datasets:
        for configuration in grid.configurations:
            for arm in grid.arms:
                mine = [
                    r
                    for r in results
                    if (r.run.dataset, r.run.configuration, r.run.arm.name) == (dataset, configuration, arm.name)
                ]
                done = [r for r in mine if r.status == "finished"]
                records = [r.record for r in done if r.record and r.record.summary_sha256]
                budgets = [
                    mean_over_cases(of_cell(mine, (dataset, configuration, n), arm.name), "dice") for n in grid.labels
                ]
                there = [v for v in budgets if v is not None]
                dice = number(fmean(there), "dice") if there else "missing"
                dice += f", {len(there)}/{len(budgets)} budgets" if 0 < len(there) < len(budgets) else ""
                costs = [
                    middle([getattr(record, name) for record in records], form)
                    for name, form in (
                        ("parameters", ",.0f"),
                        ("seconds_per_iteration", ".3f"),
                        ("seconds_per_volume", ".1f"),
                        ("peak_memory_mb", ",.0f"),
                        ("peak_gpu_memory_mb", ",.0f"),
                    )
                ]
                rows.append([dataset, configuration, arm.name, f"{len(done)}/{len(mine)}", dice, *costs])
    note = (
        "Dice: mean over the label budgets of the means above. Seconds an iteration: median epoch over its training "
        "iterations, nnU-Net's validation iterations included. Seconds a volume: final validation (mirrored where arms "
        "mirror), export and evaluation. Memory: of the largest process, and of the whole GPU while it ran."
    )
    header = [
        "data set",
        "configuration",
        "arm",
        "runs",
        "Dice",
        "parameters",
        "s/iteration",
        "s/volume",
        "MB",
        "GPU MB",
    ]
    return Table(name="cost", title="Cost beside accuracy", note=note, header=header, rows=rows)


def middle(values: list[float | None], form: str) -> str:
    """Median of what was measured."""
    there = [v for v in values if v is not None]
    return format(median(there), form) if there else "not measured"


def status_table(results: list[Result]) -> Table:
    """Every run, whatever became of it."""
    rows = [
        [
            *(r.run.dataset, r.run.configuration, str(r.run.fold), str(r.run.labels), str(r.train_cases)),
            *(str(r.run.seed), r.run.arm.name, r.status if r.status == "finished" else r.status.upper()),
            "; ".join([*r.problems, *r.notes]),
            r.sha256.get("validation/summary.json", ""),
        ]
        for r in results
    ]
    header = ["data set", "configuration", "fold", "labels", "training cases", "seed", "arm", "status", "remarks"]
    note = "MISSING and CHANGED runs are in no number below. CHANGED: there, but not what nnU-Net wrote for this grid."
    return Table(name="runs", title="Runs", note=note, header=[*header, "summary.json sha256"], rows=rows)
