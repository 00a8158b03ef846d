"""The linear probe: against a second, plain writing, and as users run it, while training and on weights files."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET, World
from processes import RUNS, start, wait_for

from nnunetv2_hiendmae.architectures import PrimusConfig, ViTConfig
from nnunetv2_hiendmae.architectures.encoder import Encoder
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.crops import crop_around
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW
from nnunetv2_hiendmae.probe.labelled import Crops, Labelled, organ_voxels, read_case, read_crops
from nnunetv2_hiendmae.probe.linear import Probe

CROP, PATCH = (16, 24, 18), (8, 8, 6)
KINDS = {
    "vit": ViTConfig(patch_size=PATCH, embed_dim=12, depth=2, num_heads=2, taps=(0, 1)),
    "primus": PrimusConfig(patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, taps=(0, 1), num_register_tokens=2),
}
SMALL = "hiendmae_pretrain -d 901 -preset tiny -device cpu -batch_size 2 -crop_size 16 24 16 -num_workers 0"
PROBED = f"{SMALL} -probe 901 -probe_every 2 -val_every 3 -preview_epochs 0 -steps 5"


@pytest.fixture
def labelled(world: World, monkeypatch: pytest.MonkeyPatch) -> Labelled:
    for kind in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / kind))
    return Labelled.open("901", "nnUNetPlans", "3d_fullres", DEFAULT_WINDOW)


def plain_tokens(encoder: Encoder, crops: Crops) -> np.ndarray:
    """Crop by crop."""
    rows = []
    for image in crops.images:
        with torch.no_grad():
            taps, _ = encoder(torch.from_numpy(image[None] / 255.0).float())
        rows += [np.concatenate([tap[0, encoder.num_prefix + i] for tap in taps]) for i in range(2 * 3 * 3)]
    return np.array(rows, np.float64)


def plain_dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * sum(a and b for a, b in zip(found, truth, strict=True)) / (sum(found) + sum(truth))


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_plain_writing(kind: str, labelled: Labelled) -> None:
    torch.manual_seed(0)
    encoder = KINDS[kind].build((2, 3, 3), pretraining=True)
    probe = Probe(labelled, (18, 24, 20), PATCH)
    probe.fit.known[::7] = probe.judge.known[3:9] = False
    values = probe(encoder)
    assert values == probe(encoder) and list(values) == ["probe_dice", *(f"probe_dice/{name}" for name in probe.organs)]

    x, y = (plain_tokens(encoder.eval(), crops)[crops.known] for crops in (probe.fit, probe.judge))
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, y = (x - mean) / deviation, (y - mean) / deviation
    rows = np.vstack([x, np.sqrt(0.01 * len(x)) * np.eye(x.shape[1])])  # ridge as least squares with more rows
    expected = []
    for name in probe.organs:
        column = list(labelled.organs).index(name)
        organ, truth = (crops.organs[crops.known][:, column] for crops in (probe.fit, probe.judge))
        target = np.concatenate([organ - organ.mean(), np.zeros(x.shape[1])])
        weights = np.linalg.lstsq(rows, target, rcond=None)[0]
        scores, shown = x @ weights, y @ weights
        threshold = max(sorted(scores, reverse=True), key=lambda t: plain_dice(scores >= t, organ))
        expected.append(plain_dice(shown >= threshold, truth))
        assert values[f"probe_dice/{name}"] == pytest.approx(expected[-1], abs=0.02), name  # a token at the threshold
    assert values["probe_dice"] == pytest.approx(np.mean(expected), abs=0.01)


def test_crops_and_what_is_in_their_tokens(labelled: Labelled) -> None:
    assert len(labelled.fit) == len(labelled.judge) == 3 and not set(labelled.fit) & set(labelled.judge)
    with_ignored = replace(labelled, organs={"trunk": (1, 2), "spine": (3,)}, ignored=4)
    crops = read_crops(with_ignored, labelled.fit[:2], CROP, PATCH)
    scale, shift = labelled.channels[0].scale, labelled.channels[0].shift
    at = 0
    for turn, case in enumerate(labelled.fit[:2]):
        image, seg = read_case(labelled, case)
        for voxel in organ_voxels(seg[0], [(1, 2), (3,)], turn):
            assert seg[0][voxel] in (1, 2, 3)
            start = crop_around(voxel, seg.shape[1:], CROP)
            box = tuple(slice(s, s + n) for s, n in zip(start, CROP, strict=True))
            assert min(start) >= 0
            canonical = np.clip(image[(slice(None), *box)] * scale + shift, 0, 1)
            assert np.abs(crops.images[at // 18] / 255.0 - canonical).max() <= 0.5 / 255 + 1e-5
            for h, w, d in np.ndindex(2, 3, 3):
                token = seg[0][box][8 * h : 8 * h + 8, 8 * w : 8 * w + 8, 6 * d : 6 * d + 6]
                trunk, spine = sum(token == 1) + sum(token == 2), token == 3
                assert crops.organs[at].tolist() == [np.sum(trunk) >= 38.4, np.sum(spine) >= 38.4]
                assert crops.known[at] == (4 not in token)
                at += 1
    assert at == len(crops.organs) and crops.images.dtype == np.uint8


def test_a_crop_larger_than_the_ct_is_filled_with_air(labelled: Labelled) -> None:
    size: Size = (64, 48, 48)
    crops = read_crops(labelled, labelled.fit[:1], size, (8, 8, 8))
    assert (crops.images[:, :, [0, -1]] == round(255 * labelled.channels[0].air)).all()
    assert crops.images.max() > 200 and crops.known.all()


def metrics(run: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "probe_dice" in entry]


def sha256(output: str) -> str:
    return output.rsplit("sha256 ", 1)[1]


def test_while_it_trains_and_on_the_weights_file(world: World, tmp_path: Path) -> None:
    out = world.run(f"{PROBED} -run probed")
    run = world.root / RUNS / "probed"
    curve = metrics(run)
    assert [entry["step"] for entry in curve] == [0, 2, 4, 5]
    assert all({f"probe_dice/{name}" for name in ("liver", "kidneys", "spine", "aorta")} <= set(e) for e in curve)
    assert "step 5/5: probe" in out and curve[0] != {**curve[3], "step": 0}

    weights = run / "encoder_weights.pth"
    world.run(f"hiendmae_benchmark probe -d 901 -w {weights} -device cpu -o {tmp_path / 'probe.csv'}")
    with open(tmp_path / "probe.csv", newline="", encoding="utf-8") as stream:
        trained, random = csv.DictReader(stream)
    assert trained["weights"] == str(weights) and random["weights"] != str(weights)
    assert {k: float(v) for k, v in trained.items() if k != "weights"} == pytest.approx(
        {k: v for k, v in curve[-1].items() if k != "step"}, abs=0.01
    )
    assert trained["probe_dice"] != random["probe_dice"]


@pytest.mark.slow
def test_the_probe_changes_nothing_and_is_continued(world: World) -> None:
    out = world.run(f"{PROBED} -run whole")
    assert sha256(out) == sha256(world.run(f"{PROBED.replace('-probe 901 -probe_every 2 ', '')} -run unprobed"))

    process = start(world, f"{PROBED} -run continued")
    wait_for(process, "step 2/5: probe")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert sha256(world.run(f"{PROBED} -run continued --c")) == sha256(out)
    assert metrics(world.root / RUNS / "continued") == metrics(world.root / RUNS / "whole")


def test_what_cannot_be_probed_is_told(labelled: Labelled, world: World, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="nnUNetPlans of Dataset901_TestPhantom have voxels of 8 × 6 × 6 mm"):
        labelled.check([(1.5, 1.5, 1.5)], 1)
    with pytest.raises(ValueError, match="has 1 channels, the pre-training had 2"):
        labelled.check([], 2)
    labelled.check([(8.1, 6, 6), (1, 1, 1)], 1)

    shutil.copytree(world.root / "preprocessed" / DATASET, tmp_path / DATASET)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    cases = [*labelled.fit, *labelled.judge]
    patients = tmp_path / DATASET / "patients.csv"
    patients.write_text("case,patient\n" + "".join(f"{case},a\n" for case in cases))
    opened = ("901", "nnUNetPlans", "3d_fullres", DEFAULT_WINDOW)
    with pytest.raises(ValueError, match="holds labels of 1 patients"):
        Labelled.open(*opened)
    patients.write_text("case,patient\n" + "".join(f"{case},{i // 3}\n" for i, case in enumerate(cases)))
    assert len(Labelled.open(*opened).fit) == len(Labelled.open(*opened).judge) == 1
    description = tmp_path / DATASET / "dataset.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), "labels": {"background": 0}}))
    with pytest.raises(ValueError, match=r"dataset\.json names 0 organs"):
        Labelled.open(*opened)
    with pytest.raises(ValueError, match="Run 'nnUNetv2_plan_and_preprocess"):
        Labelled.open("901", "OtherPlans", "3d_fullres", DEFAULT_WINDOW)
    (tmp_path / DATASET / "nnUNetPlans_3d_fullres" / f"{labelled.fit[0]}_seg.b2nd").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Cannot read .* or its labels"):
        Probe(replace(labelled, folder=tmp_path / DATASET / "nnUNetPlans_3d_fullres"), CROP, PATCH)

    told = world.run(f"{SMALL} -steps 1 -probe 999", ok=False)
    assert "error: -probe 999: " in told and "Traceback" not in told
