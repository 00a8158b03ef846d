"""The report's figures, as SVG text that is the same for the same numbers."""

from __future__ import annotations

import io
from dataclasses import dataclass
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nnunetv2_hiendmae.benchmark.collect import Result
from nnunetv2_hiendmae.benchmark.grid import Grid
from nnunetv2_hiendmae.benchmark.tables import Cell, Comparison, cells, mean_over_cases, of_cell, organs_of

AXIS = {"dice": "Dice", "nsd": "surface Dice (NSD)", "hd95": "HD95 (mm)"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure of the report: its file's name, its caption, its content."""

    name: str
    title: str
    svg: bytes


def to_svg(figure: Figure) -> bytes:
    """SVG without date and with fixed ids; text as text, which is small and can be searched."""
    file = io.BytesIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": "hiendmae_benchmark", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    ):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def colour(index: int) -> str:
    """Of the arm of that index, the same in every figure."""
    return f"C{index % 10}"


def label_curves(grid: Grid, results: list[Result], dataset: str, configuration: str, metric: str) -> Picture:
    """Metric over labelled cases: a line through each arm's means, a dot for each finished run."""
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axis = figure.subplots()
    ticks = set()
    for i, arm in enumerate(grid.arms):
        means, dots, mine = [], [], []  # (training cases, metric) of budgets and of runs
        for cell in cells(grid):
            runs = of_cell(results, cell, arm.name) if cell[:2] == (dataset, configuration) else []
            ticks |= {r.train_cases for r in runs}
            mine += runs
            done = [r for r in runs if r.status == "finished"]
            if (whole := mean_over_cases(done, metric)) is not None:
                means.append((fmean(r.train_cases for r in done), whole))
            dots += [(r.train_cases, v) for r in done if (v := mean_over_cases([r], metric)) is not None]
        means.sort()
        axis.plot([x for x, _ in means], [y for _, y in means], color=colour(i), label=legend(arm.name, mine))
        axis.scatter([x for x, _ in dots], [y for _, y in dots], 14, color=colour(i), alpha=0.6)
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), [str(n) for n in sorted(ticks)])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("labelled training cases")
    axis.set_ylabel(AXIS[metric])
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    return Picture(
        name=f"{metric}_over_labels_{dataset}_{configuration}.svg",
        title=f"{AXIS[metric]} over labels, {dataset}, {configuration}",
        svg=to_svg(figure),
    )


def organ_dots(grid: Grid, results: list[Result], cell: Cell, metric: str) -> Picture:
    """Metric by organ: a mark for each arm's mean over its finished runs."""
    organs = organs_of(results, cell[0])
    figure = Figure(figsize=(5.2, 1.2 + 0.33 * max(len(organs), 3)), layout="constrained")
    axis = figure.subplots()
    for i, arm in enumerate(grid.arms):
        mine = of_cell(results, cell, arm.name)
        means = [mean_over_cases(mine, metric, organ) for organ in organs]
        there = [(m, y + 0.12 * (i - (len(grid.arms) - 1) / 2)) for y, m in enumerate(means) if m is not None]
        axis.scatter([m for m, _ in there], [y for _, y in there], 26, color=colour(i), label=legend(arm.name, mine))
    axis.set_yticks(range(len(organs)), [plain(o) for o in organs])
    axis.set_ylim(len(organs) - 0.5, -0.5)
    axis.set_xlabel(AXIS[metric])
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    return Picture(
        name=f"{metric}_by_organ_{cell[0]}_{cell[1]}_{cell[2]}.svg",
        title=f"{AXIS[metric]} by organ, {cell[0]}, {cell[1]}, {cell[2]} labels",
        svg=to_svg(figure),
    )


def forest(grid: Grid, made: list[Comparison], dataset: str, configuration: str, metric: str) -> Picture:
    """Paired differences from the first arm with their 95 % intervals."""
    rows = [c for c in made if c.cell[:2] == (dataset, configuration) and c.metric == metric]
    names = [arm.name for arm in grid.arms]
    figure = Figure(figsize=(5.2, 1.3 + 0.28 * max(len(rows), 2)), layout="constrained")
    axis = figure.subplots()
    for y, c in enumerate(rows):
        if c.difference is None:
            axis.text(0, y, "missing", va="center", ha="center", fontsize=8)
            continue
        axis.scatter([c.difference], [y], 26, color=colour(names.index(c.arm)))
        if c.interval:
            axis.plot(c.interval, [y, y], color=colour(names.index(c.arm)))
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{c.cell[2]} labels, {plain(c.arm)}" for c in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"difference in {AXIS[metric]} from {plain(names[0])}")
    axis.grid(alpha=0.3, axis="x")
    return Picture(
        name=f"{metric}_differences_{dataset}_{configuration}.svg",
        title=f"Paired differences, {AXIS[metric]}, {dataset}, {configuration}",
        svg=to_svg(figure),
    )


def legend(arm: str, runs: list[Result]) -> str:
    """An arm's name, and how many of its runs are there if not all are."""
    done = sum(r.status == "finished" for r in runs)
    return plain(arm) + (f" ({done}/{len(runs)} runs)" if done < len(runs) else "")


def plain(name: str) -> str:
    """A name that matplotlib neither reads as formula nor hides from the legend."""
    return name.replace("$", r"\$").lstrip("_")
