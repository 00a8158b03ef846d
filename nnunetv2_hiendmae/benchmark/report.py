"""The report: Markdown, CSV and one self-contained HTML page, made from run folders alone.

The same run folders give the same bytes. What was read is written, with its sha256, to ``provenance.json``.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nnunetv2_hiendmae.benchmark.arms import PRETRAINED_SHA256
from nnunetv2_hiendmae.benchmark.as_run import as_run_tables
from nnunetv2_hiendmae.benchmark.collect import METRICS, Result, collect
from nnunetv2_hiendmae.benchmark.grid import Grid
from nnunetv2_hiendmae.benchmark.overlap import overlap_lines
from nnunetv2_hiendmae.benchmark.plan import differences_text, write_text
from nnunetv2_hiendmae.benchmark.plots import Picture, forest, label_curves, organ_dots
from nnunetv2_hiendmae.benchmark.record import file_sha256
from nnunetv2_hiendmae.benchmark.splits import SPLITS_FILE
from nnunetv2_hiendmae.benchmark.surface import Diagonals
from nnunetv2_hiendmae.benchmark.tables import (
    MEAN,
    Table,
    cells,
    comparison_table,
    comparisons,
    cost_table,
    metric_table,
    status_table,
)
from nnunetv2_hiendmae.files import preprocessed_folder, read_json
from nnunetv2_hiendmae.nnunet.settings import BLOCK

PROVENANCE_FILE = "provenance.json"
DIAGONALS = "image_diagonal_mm"
"""Key in it: of the images in which an organ was missed or invented, by the sha256 of the reference."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 0 auto;
  padding: 1rem; }
li { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } p { max-width: 46rem; }
.bad { border-left: .3rem solid #b00020; background: #fdecee; padding: .6rem 1rem; font-weight: 600; }
.good { border-left: .3rem solid #1b6e3c; background: #e9f6ee; padding: .6rem 1rem; }
.scroll { overflow-x: auto; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; white-space: nowrap; }
td.long { min-width: 18rem; overflow-wrap: anywhere; white-space: normal; } tr.mean { font-weight: 600; }
th { background: #f4f4f4; } td.bad-cell { background: #fdecee; color: #8c0019; font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; flex: 1 1 20rem; max-width: 36rem; }
figure img { width: 100%; height: auto; } figcaption { font-size: .85rem; color: #444; }
"""


def report(grid: Grid, folder: Path, tolerance_mm: float) -> list[str]:
    """Write the report into ``folder``; returns one line for each run that is missing or changed."""
    file = folder / PROVENANCE_FILE
    last = read_json(file) if file.is_file() else {}
    earlier, diagonals = last.get("runs", {}), Diagonals(known=last.get(DIAGONALS, {}))
    results = []
    for run in grid.runs():
        seen = earlier.get(run.name, {})
        first, files = seen.get("first_seen", {}), seen.get("files_sha256", {})
        results.append(collect(grid, run, tolerance_mm, first, files, diagonals))
    made = comparisons(grid, results)
    tables = [
        status_table(results),
        *(metric_table(grid, results, metric, tolerance_mm) for metric in METRICS),
        comparison_table(grid, made),
        cost_table(grid, results),
        *as_run_tables(grid, results),
    ]
    pictures = [
        picture
        for d in grid.datasets
        for c in grid.configurations
        for picture in (
            *(label_curves(grid, results, d, c, metric) for metric in ("dice", "nsd")),
            *(forest(grid, made, d, c, metric) for metric in ("dice", "nsd") if len(grid.arms) > 1),
            *(organ_dots(grid, results, cell, "dice") for cell in cells(grid) if cell[:2] == (d, c)),
        )
    ]
    failures = [f"{r.run.name}: {r.status.upper()}: {'; '.join(r.problems)}" for r in results if r.problems]
    provenance = provenance_of(grid, folder, results, earlier)
    provenance |= {DIAGONALS: dict(sorted(diagonals.used.items()))}
    # last, so that an interrupted report leaves no trace in what counts as seen
    write_text(folder / "report.md", markdown(grid, tables, pictures, failures, provenance))
    for picture in pictures:
        write_text(folder / picture.name, picture.svg.decode())
    write_text(folder / "report.html", page(grid, tables, pictures, failures, provenance))
    for table in tables:
        write_text(folder / f"{table.name}.csv", csv_text(table.header, table.rows))
    write_text(folder / "cases.csv", cases_csv(results))
    write_text(file, json.dumps(provenance, indent=1))
    return failures


def provenance_of(grid: Grid, folder: Path, results: list[Result], earlier: dict[str, Any]) -> dict[str, Any]:
    """What the numbers come from: versions and weights of the runs, hashes of splits, plans and files read."""
    runs = {}
    for r in results:
        before = earlier.get(r.run.name, {}).get("first_seen", {})
        record = r.record
        runs[r.run.name] = {
            "folder": f"{r.folder.parent.name}/{r.folder.name}",
            "command": record.command if record else None,
            "versions": record.versions if record else None,
            "plans_sha256": record.plans_sha256 if record else None,
            "split_sha256": record.split_sha256 if record else None,
            "weights_sha256": weights_of(r),
            "files_sha256": r.sha256,
            # A recorded run vouches for itself, so it may be made anew; any other stays what it first was.
            "first_seen": r.sha256 if record and r.status == "finished" else before or r.sha256,
        }
    splits = {d: file_sha256(preprocessed_folder(d) / SPLITS_FILE) for d in grid.datasets}
    return {"splits_final_sha256": splits, "pretraining_overlap": overlap_lines(grid, folder), "runs": runs}


def weights_of(result: Result) -> str | None:
    """sha256 of the weights that a finished run started from, as in the plans that its trainer saved."""
    if result.status != "finished":
        return None
    plans = read_json(result.folder.parent / "plans.json")
    block = plans["configurations"].get(result.run.configuration, {}).get(BLOCK, {})
    return block.get("weights_sha256") or plans.get(PRETRAINED_SHA256)


def summary_lines(provenance: dict[str, Any]) -> list[str]:
    """Provenance in a few lines: what all runs share, and what several have."""
    lines = [f"{d}: splits_final.json sha256 {h}" for d, h in provenance["splits_final_sha256"].items()]
    runs = provenance["runs"].values()
    for versions in sorted({json.dumps(r["versions"]) for r in runs if r["versions"]}):
        lines.append("made with " + ", ".join(f"{k} {v}" for k, v in json.loads(versions).items()))
    users: dict[str, set[str]] = {}
    for r in runs:
        if r["weights_sha256"]:
            users.setdefault(r["weights_sha256"], set()).add(r["folder"].rpartition("/")[0])
    lines += [f"weights sha256 {sha256}: {', '.join(sorted(models))}" for sha256, models in sorted(users.items())]
    return lines


def csv_text(header: list[str], rows: list[list[str]]) -> str:
    """CSV with a header line."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def cases_csv(results: list[Result]) -> str:
    """Every score of every finished run in full precision."""
    rows = [
        [
            *(r.run.dataset, r.run.configuration, str(r.run.fold), str(r.run.labels), str(r.run.seed), r.run.arm.name),
            *(s.case, s.organ),
            *(repr(getattr(s, m)) for m in METRICS),
            s.outcome,
        ]
        for r in results
        if r.status == "finished"
        for s in r.scores
    ]
    header = ["data set", "configuration", "fold", "labels", "seed", "arm", "case", "organ", *METRICS, "outcome"]
    return csv_text(header, rows)


def markdown(
    grid: Grid, tables: list[Table], pictures: list[Picture], failures: list[str], provenance: dict[str, Any]
) -> str:
    """The report for a repository or a chat."""

    def row(values: list[str]) -> str:
        return "| " + " | ".join(v.replace("|", "\\|") for v in values) + " |"

    parts = [f"# Benchmark {grid.name}", "", *verdict(grid, failures), ""]
    parts += [*(f"- {line}" for line in provenance["pretraining_overlap"]), ""]
    parts += ["## What differs between the arms", "", "```", differences_text(grid), "```", ""]
    parts += ["## Curves", "", *(f"![{p.title}]({quote(p.name)})" for p in pictures), ""]
    for table in tables:
        parts += [f"## {table.title}", "", table.note, "", row(table.header), row(["---"] * len(table.header))]
        parts += [*map(row, table.rows), ""]
    parts += ["## Provenance", "", *(f"- {line}" for line in summary_lines(provenance)), ""]
    return "\n".join(parts)


def verdict(grid: Grid, failures: list[str]) -> list[str]:
    """Whether every run is there, in a sentence, and each that is not."""
    total = len(grid.runs())
    if not failures:
        return [f"All {total} runs are finished, and their summaries are those that nnU-Net wrote."]
    return [f"{len(failures)} of {total} runs are MISSING or CHANGED:", "", *(f"- {line}" for line in failures)]


def page(
    grid: Grid, tables: list[Table], pictures: list[Picture], failures: list[str], provenance: dict[str, Any]
) -> str:
    """One HTML page without anything from elsewhere."""
    total, e = len(grid.runs()), html.escape
    head = f"All {total} runs are finished, and their summaries are those that nnU-Net wrote."
    if failures:
        items = "".join(f"<li>{e(line)}</li>" for line in failures)
        head = f"{len(failures)} of {total} runs are MISSING or CHANGED:<ul>{items}</ul>"
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmark {e(grid.name)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f'<h1>Benchmark {e(grid.name)}</h1><div class="{"bad" if failures else "good"}">{head}</div>',
        *(
            f'<p class="{"good" if line.endswith(": none.") else "bad"}">{e(line)}</p>'
            for line in provenance["pretraining_overlap"]
        ),
        '<h2>Curves</h2><div class="figures">',
        *map(figure_html, pictures),
        "</div>",
        *map(table_html, [*tables[1:], tables[0]]),
        f"<h2>What differs between the arms</h2><pre>{e(differences_text(grid))}</pre>",
        f"<h2>Provenance</h2><ul>{''.join(f'<li>{e(line)}</li>' for line in summary_lines(provenance))}</ul>",
        "</body></html>\n",
    ]
    return "\n".join(parts)


def figure_html(picture: Picture) -> str:
    """An image whose bytes are in the page."""
    title, data = html.escape(picture.title), base64.b64encode(picture.svg).decode()
    image = f'<img alt="{title}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{title}</figcaption></figure>"


def table_html(table: Table) -> str:
    """A table that scrolls by itself on a narrow screen; what is missing or changed stands out."""
    e = html.escape
    header = "".join(f"<th>{e(name)}</th>" for name in table.header)
    rows = "".join(
        f"<tr{' class=mean' if MEAN in row else ''}>{''.join(map(cell_html, row))}</tr>" for row in table.rows
    )
    body = f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h2>{e(table.title)}</h2><p>{e(table.note)}</p>{body}"


def cell_html(value: str) -> str:
    """One cell, escaped."""
    bad = value.startswith("missing") or value in ("MISSING", "CHANGED")
    kind = " class=bad-cell" if bad else " class=long" if len(value) > 48 else ""
    return f"<td{kind}>{html.escape(value)}</td>"
