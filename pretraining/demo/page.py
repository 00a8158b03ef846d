"""What the demo shows at its end: a table of Dice, and one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import re
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nnunetv2_hiendmae.files import read_json
from pretraining.demo.phantoms import LABELS
from pretraining.demo.recipe import LABELLED, PRETRAINED, SCRATCH, UNLABELLED, Recipe, Step
from pretraining.visualize.cases import Case
from pretraining.visualize.page import write_page
from pretraining.visualize.panels import Gallery, Panel, blend, enlarged, gray, hide
from pretraining.visualize.source import Source
from pretraining.visualize.tiles import reconstruct_volume
from pretraining.visualize.views import Orientation

ORGANS = tuple(name for name, label in LABELS.items() if label)
COLOURS = np.array(
    [(0, 0, 0), (214, 120, 60), (170, 90, 200), (240, 210, 70), (90, 190, 110), (230, 70, 80), (90, 160, 235)], np.uint8
)
"""Of the labels, in order."""
OPACITY = 0.55
ENLARGED = 3
"""Voxels of several mm are small pictures."""
NAMES = {PRETRAINED: "pre-trained", SCRATCH: "from scratch"}
CAPTION = "Synthetic phantoms, a toy: the numbers say nothing about patients, and little about pre-training."

STYLE = """<style>
table { border-collapse: collapse; margin: .8rem 0; } td, th { padding: 3px 14px 3px 0; text-align: left; font-weight: 400; }
th { color: #a9b0b7; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.chip { display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .5em; vertical-align: -.1em; }
.curves { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); max-width: 1000px; }
.curves img { width: 100%; } pre { background: #1f2226; padding: 12px; overflow-x: auto; font-size: .85rem; max-width: 110ch; }
</style>"""  # noqa: E501

OWN_DATA = """export nnUNet_raw=/data/raw nnUNet_preprocessed=/data/preprocessed nnUNet_results=/data/results
hiendmae_ingest -i FOLDER_WITH_DICOM -d 500 -n MyScans      # or any data set in nnU-Net's raw format
hiendmae_plan_and_preprocess -d 500                         # images, no labels
hiendmae_pretrain -d 500
nnUNetv2_plan_and_preprocess -d 17 -pl HiEndMAEPlanner -c 3d_fullres      # your few labelled cases
nnUNetv2_train 17 3d_fullres 0 -p HiEndMAEPlans -tr nnUNetTrainerHiEndMAE"""


def dice(out: Path) -> dict[str, dict[str, float]]:
    """Mean Dice of the test phantoms: trainer → organ → value, from nnU-Net's summaries."""
    means = {trainer: read_json(out / "predictions" / trainer / "summary.json")["mean"] for trainer in NAMES}
    return {trainer: {organ: mean[str(LABELS[organ])]["Dice"] for organ in ORGANS} for trainer, mean in means.items()}


def table(values: dict[str, dict[str, float]]) -> str:
    """The table for a terminal."""
    rows = [f"  {'organ':<10}" + "".join(f"{name:>14}" for name in NAMES.values())]
    rows += [f"  {organ:<10}" + "".join(f"{values[t][organ]:14.3f}" for t in NAMES) for organ in ORGANS]
    return "\n".join([*rows, f"  {'mean':<10}" + "".join(f"{np.mean([*values[t].values()]):14.3f}" for t in NAMES)])


def table_html(values: dict[str, dict[str, float]] | None) -> str:
    """The table with the organs' colours; None: the colours alone."""
    names = "".join(f"<th>{name}</th>" for name in NAMES.values()) if values else ""
    rows = [f"<tr><th>{'Dice' if values else 'organ'}</th>{names}</tr>"]
    for organ in ORGANS:
        chip = f'<span class="chip" style="background:rgb({",".join(map(str, COLOURS[LABELS[organ]]))})"></span>'
        cells = "".join(f'<td class="n">{values[t][organ]:.3f}</td>' for t in NAMES) if values else ""
        rows.append(f"<tr><td>{chip}{organ}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def overlay(ct: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Organs in colour over a slice."""
    big = enlarged(labels, ENLARGED, smooth=False)
    return blend(plain(ct), COLOURS[big], OPACITY * (big > 0)[..., None])


def plain(ct: np.ndarray) -> np.ndarray:
    """A slice, enlarged smoothly."""
    return enlarged(gray(ct), ENLARGED, smooth=True)


def pictures(source: Source, case: Case, segmentations: dict[str, np.ndarray], seed: int) -> Gallery:
    """CT, masked, reconstruction, then a segmentation ``(H, W, D)`` each."""
    assert source.model is not None
    result = reconstruct_volume(source.model, case.volume, seed)

    def masked(ct: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        return enlarged(hide(ct, hidden), ENLARGED, smooth=False)

    panels = [
        Panel(title="CT", volumes=(case.volume,), paint=plain),
        Panel(title="what the encoder sees in pre-training", volumes=(case.volume, result.masked), paint=masked),
        Panel(title="its reconstruction", volumes=(result.rebuilt,), paint=plain),
    ]
    panels += [
        Panel(title=f"organs: {name}", volumes=(case.volume, s), paint=overlay) for name, s in segmentations.items()
    ]
    text = (
        "Blue patches were hidden. The network predicts the pattern within each; its mean and contrast are given back "
        "from the CT."
    )
    h, w, d = case.voxel(None)
    organs = np.argwhere(next(iter(segmentations.values())) == LABELS["kidneys"])
    if len(organs):
        h = round(float(organs[:, 0].mean()))
    return Gallery(key="demo", title="One CT, slice by slice", text=text, panels=panels, voxel=(h, w, d),
                   scales=("hu",), columns=3)  # fmt: skip


def curves(out: Path) -> str:
    """The losses of pre-training and of both fine-tunings, as two images."""
    metrics = next((out / "nnUNet_results" / UNLABELLED).glob("*/*/metrics.jsonl"))
    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train, held_out = ([e for e in entries if name in e] for name in ("loss", "val_loss"))
    steps = [e["step"] for e in held_out]
    lines = [
        ("loss", [e["step"] for e in train], [e["loss"] for e in train], "#6aa5ff"),
        ("held-out loss", steps, [e["val_loss"] for e in held_out], "#ffb35c"),
        ("predicting each patch's mean", steps, [e["val_mean_patch_loss"] for e in held_out], "#9aa0a6"),
    ]
    images = [curve("pre-training", "step", lines)]
    lines = []
    for (trainer, name), colour in zip(NAMES.items(), ("#6aa5ff", "#ffb35c"), strict=True):
        log = max((out / "nnUNet_results" / LABELLED).glob(f"{trainer}__*/fold_0/training_log_*.txt"))
        losses = [float(value) for value in re.findall(r"train_loss (\S+)", log.read_text(encoding="utf-8"))]
        lines.append((name, list(range(1, len(losses) + 1)), losses, colour))
    images.append(curve("fine-tuning: cross-entropy minus Dice", "epoch", lines))
    return f'<section><h2>Losses</h2><div class="curves">{"".join(images)}</div></section>'


def curve(title: str, below: str, lines: list[tuple[str, list[int], list[float], str]]) -> str:
    """One plot as an image that the page holds."""
    figure = Figure(figsize=(5, 3.2), layout="constrained", facecolor="#15171a", dpi=160)
    axis = figure.subplots()
    axis.set_facecolor("#15171a")
    for name, x, y, colour in lines:
        axis.plot(x, y, "-o", ms=3, label=name, color=colour)
    axis.set_title(title, color="#e4e6e8", fontsize=10)
    axis.set_xlabel(below, color="#c5cad0")
    axis.tick_params(colors="#c5cad0")
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8, labelcolor="#c5cad0", facecolor="#1f2226", edgecolor="#3a3f45")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def write_demo_page(
    out: Path, recipe: Recipe, steps: list[Step], source: Source, case: Case, truth: np.ndarray,
    segmentations: dict[str, np.ndarray], seed: int,
) -> Path:  # fmt: skip
    """``index.html`` of a finished demo."""
    gallery = pictures(source, case, {"truth": truth, **segmentations}, seed)
    commands = "\n".join(command.text for step in steps for command in step.commands)
    bottom = (
        f"{curves(out)}<section><h2>Your own data</h2><p>The same commands, on a GPU:</p>"
        f"<pre>{escape(OWN_DATA)}</pre><p>This demo's network on a CT of yours:</p>"
        f"<pre>hiendmae_demo -o {escape(str(out))} -i ct.nii.gz</pre>"
        f"<h2>What ran here</h2><pre>{escape(commands)}</pre></section>"
    )
    facts = [
        CAPTION,
        f"{recipe.num_unlabelled} phantoms without labels, {recipe.num_labelled - 1} with labels, {recipe.num_test} to "
        f"test on; voxels of {recipe.voxel_mm:g} mm. Both columns: the same network, labels and training, from the "
        "pre-trained encoder and from random weights.",
    ]
    file = out / "index.html"
    write_page([gallery], Orientation.of(case.frame), case.window_hu, "Hi-End-MAE in five minutes", facts, file,
               top=STYLE + table_html(dice(out)), bottom=bottom)  # fmt: skip
    return file


def write_own_page(out: Path, source: Source, case: Case, segmentations: dict[str, np.ndarray], seed: int) -> Path:
    """``your_ct.html``: the demo's networks on a user's CT."""
    facts = [
        f"{case.name}, at {' × '.join(f'{mm:.3g}' for mm in case.frame.spacing)} mm. Both networks have seen nothing "
        "but synthetic phantoms: on a patient the organs are a guess.",
    ]
    file = out / "your_ct.html"
    bottom = f"<section><h2>With your own data it learns your own CT</h2><pre>{escape(OWN_DATA)}</pre></section>"
    write_page([pictures(source, case, segmentations, seed)], Orientation.of(case.frame), case.window_hu,
               "The demo's network on your CT", facts, file, top=STYLE + table_html(None), bottom=bottom)  # fmt: skip
    return file
