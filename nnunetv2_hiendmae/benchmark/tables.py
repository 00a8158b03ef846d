"""The report's tables, as plain strings, so that Markdown, CSV and HTML show the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nnunetv2_hiendmae.benchmark.collect import METRICS, Result, Score, mean_of
from nnunetv2_hiendmae.benchmark.grid import Grid
from nnunetv2_hiendmae.benchmark.statistics import bootstrap_interval, holm, wilcoxon_p

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
    """One a case: the mean over organs that are defined in both, then over label subsets that both have finished."""
    pairs: int
    """Runs that both arms have finished."""
    planned: int
    """Runs of an arm in the grid."""
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None


def cells(grid: Grid) -> list[Cell]:
    """Data sets × configurations × label budgets."""
    return [(d, c, n) for d in grid.datasets for c in grid.configurations for n in grid.labels]


def of_cell(results: Iterable[Result], cell: Cell, arm: str) -> list[Result]:
    """The runs of one arm in a cell: one for each fold and seed."""
    return [r for r in results if (r.run.dataset, r.run.configuration, r.run.labels) == cell and r.run.arm.name == arm]


def organs_of(results: Iterable[Result], dataset: str) -> list[str]:
    """Organs of a data set, in its own order."""
    return list(dict.fromkeys(s.organ for r in results if r.run.dataset == dataset for s in r.scores))


def run_mean(result: Result, metric: str, organ: str = MEAN) -> float | None:
    """Mean over cases; for ``mean`` the mean over organs of those, as nnU-Net's ``foreground_mean``."""
    organs = list(dict.fromkeys(s.organ for s in result.scores)) if organ == MEAN else [organ]
    return mean_of([mean_of([getattr(s, metric) for s in result.scores if s.organ == o]) for o in organs])


def number(value: float | None, metric: str) -> str:
    """Three digits for shares, one for millimetres."""
    return "undefined" if value is None else f"{value:.{1 if metric == 'hd95' else 3}f}"


def cell_text(runs: list[Result], metric: str, organ: str) -> str:
    """Mean over the finished runs, their range, and how many of the runs they are."""
    done = [r for r in runs if r.status == "finished"]
    if not done:
        return f"missing (0/{len(runs)} runs)"
    values = [v for r in done if (v := run_mean(r, metric, organ)) is not None]
    text = number(mean_of(values), metric)
    if len(values) > 1:
        text += f" ({number(min(values), metric)}–{number(max(values), metric)})"
    scored = [s for r in done for s in r.scores if organ in (MEAN, s.organ)]
    undefined = sum(getattr(s, metric) is None for s in scored)
    text += f", {undefined} of {len(scored)} undefined" if undefined else ""
    return text + (f", {len(done)}/{len(runs)} runs" if len(done) < len(runs) else "")


TITLES = {
    "dice": "Dice",
    "nsd": "Surface Dice (NSD) at {tolerance:g} mm",
    "hd95": "95 % Hausdorff distance (HD95) in mm, lower is better",
}
NOTES = {
    "dice": "Mean over organs and validation cases, then over label subsets and folds (range of those in brackets).",
    "nsd": "As Dice; 0 where an organ is missed or invented altogether.",
    "hd95": "As Dice, over the cases where it is defined: a missed or invented organ has no distance and is counted.",
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
    values: dict[tuple[int, str], list[float]] = {}
    for pair, result in pairs:
        scores: dict[str, dict[str, Score]] = {}
        for s in pair.scores:
            scores.setdefault(s.case, {})[s.organ] = s
        for case, reference in scores.items():
            organs = [
                (getattr(s, metric), getattr(reference[s.organ], metric)) for s in result.scores if s.case == case
            ]
            difference = mean_of([a - b for a, b in organs if a is not None and b is not None])
            if difference is not None:
                values.setdefault((result.run.fold, case), []).append(difference)
    return [sum(v) / len(v) for v in values.values()]


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


def comparison_table(grid: Grid, made: list[Comparison]) -> Table:
    """One row a comparison."""
    rows = []
    for c in made:
        mean = mean_of(list(c.differences))
        interval = " … ".join(signed(v, c.metric) for v in c.interval) if c.interval else "too few cases"
        values = ["missing", "", "", ""]
        if mean is not None:
            values = [signed(mean, c.metric), interval, share(c.p), share(c.p_holm)]
        paired = f"{len(c.differences)}" + (f", {c.pairs}/{c.planned} runs" if c.pairs < c.planned else "")
        rows.append([c.cell[0], c.cell[1], str(c.cell[2]), c.metric, c.arm, paired, *values])
    note = (
        "Per-case differences, mean over organs and label subsets; 95 % percentile interval of 10,000 bootstrap "
        "resamples of the cases; two-sided Wilcoxon test; Holm's correction over all rows of a metric. The cases are "
        "the unit: the interval says how it might be with other patients, not with another training. With n cases "
        "the smallest possible p is 2 / 2ⁿ."
    )
    header = ["data set", "configuration", "labels", "metric", "arm", "cases", "difference", "95 % interval", "p"]
    title = f"Paired differences from {grid.arms[0].name}"
    return Table(name="comparisons", title=title, note=note, header=[*header, "p (Holm)"], rows=rows)


def signed(value: float, metric: str) -> str:
    """A difference, with its sign."""
    return f"{value:+.{1 if metric == 'hd95' else 3}f}"


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
                dice = number(mean_of([run_mean(r, "dice") for r in done]), "dice") if done else "missing"
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
        "Dice: mean over the finished runs of all label budgets. Seconds an iteration: median epoch over its training "
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
    there = sorted(v for v in values if v is not None)
    return format(there[len(there) // 2], form) if there else "not measured"


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
