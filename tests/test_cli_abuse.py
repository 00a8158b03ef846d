"""Every flag that takes a number, with values it cannot have: one line that names the trouble, exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import World
from test_import_weights import official_state

HUGE = str(10**30)
WORD, NEGATIVE, ZERO, HALF, NAN, INF = "many", "-1", "0", "1.5", "nan", "inf"
COUNT = [WORD, NEGATIVE, ZERO, HALF, HUGE, ""]
"""What no count may be."""
NATURAL = [WORD, NEGATIVE, HALF, HUGE]
"""What no number of things that may be none may be."""
THREE = ["8 8", "0 0 0", "-8 -8 -8", "a b c", f"{HUGE} 8 8", "1.5 8 8"]
POSITIVE = [WORD, NEGATIVE, ZERO, NAN, INF]

PRETRAIN = "hiendmae_pretrain -d 901 -preset tiny -device cpu -crop_size 24 24 24 -steps 1 -batch_size 2 -num_workers 0"
FLAGS = {
    PRETRAIN: {
        "-num_gpus": COUNT, "-steps": COUNT, "-lr": POSITIVE, "-val_every": COUNT, "-log_every": COUNT,
        "-checkpoint_minutes": [WORD, NEGATIVE, NAN, INF],
        "-preview_epochs": NATURAL, "-keep_checkpoints": COUNT, "-batch_size": COUNT, "-accumulate": COUNT,
        "-crop_size": [*THREE, "24 24 25", "800000 8 8"], "-vit_patch_size": [*THREE, "48 48 48"],
        "-crops_per_case": COUNT,
        "-mask_ratio": [WORD, NEGATIVE, ZERO, "1", "2", NAN, INF], "-grad_clip": [WORD, NEGATIVE, NAN, INF],
        "-window_hu": ["250 -175", "0 0", f"{NAN} 1", f"-{INF} {INF}", "1"], "-seed": NATURAL, "-num_workers": NATURAL,
        "-device": ["tpu"], "-precision": ["int8"], "-decoder": ["none"], "-preset": ["huge"], "-d": ["444", "x y"],
        "-p": ["../../etc"], "-c": ["2d", "3d_cascade"], "-run": ["../outside", ".."], "-init": ["nowhere", "{file}"],
        "-probe": ["444", "901 -probe_plans None", "901 -probe_plans"], "-probe_every": COUNT,
    },
    "hiendmae_pretrain -d 901 -preset tiny -device cpu": {"-epochs": [WORD, NEGATIVE, NAN, INF, "5 -steps 3"]},
    "hiendmae_pack -d 901": {
        "-bits": ["7", WORD], "-np": COUNT, "-window_hu": ["250 -175", f"{NAN} 1", "1"], "-d": ["444"], "-p": ["None"],
    },
    "hiendmae_plan_and_preprocess -d 901": {
        "-np": COUNT, "-num_parts": COUNT, "-part_id": [NEGATIVE, "1", WORD], "-p": ["a__b"], "-d": ["444"],
        "-spacing": ["1", "1 1", "0 0 0", f"{NAN} 1 1", f"1 1 {INF}", "mean", "1 1 1 1"],
    },
    "hiendmae_ingest -i {raw} -d 77 -n New": {
        "-np": COUNT, "-d": [*COUNT, "1000", "901"], "-n": ["a/b", "..", "a__b"], "-i": ["nowhere"],
        "--exclude_overlap": ["444"],
    },
    "hiendmae_plan -d 901": {
        "--num_epochs": COUNT, "--initial_lr": POSITIVE, "--weight_decay": [NEGATIVE, NAN, INF],
        "--layer_decay": [ZERO, "2", NAN, NEGATIVE], "--drop_path": ["1", NEGATIVE, NAN], "--feature_size": COUNT,
        "--frozen_epochs": NATURAL, "--warmup_epochs": NATURAL, "-batch_size": COUNT, "-patch_size": THREE,
        "--window_hu": ["250 -175", f"{NAN} 1", "1"], "--architecture": ["gigantic"],
        "--vit_patch_size": [*THREE, "65 8 8"], "--segmentation_decoder": ["unet"], "--weights": ["nowhere.pth"],
        "-plans_name": ["a__b"],
        "--num_iterations_per_epoch": COUNT, "--num_val_iterations_per_epoch": COUNT, "-p": ["None"], "-d": ["444"],
    },
    "hiendmae_benchmark plan -o {out} -d 901 -device cpu -arms nnunet": {
        "-num_epochs": COUNT, "-num_iterations_per_epoch": COUNT, "-batch_size": COUNT, "-patch_size": THREE,
        "-labels": [*COUNT, "0%", "100%", "99"], "-seeds": [*NATURAL, "1 1"], "-f": [WORD, NEGATIVE, "9"],
        "-arms": ["none", "hiendmae -weights nowhere.pth"], "-name": ["a__b", "a/b"], "-p": ["None"], "-d": ["444"],
    },
    "hiendmae_benchmark run -o {out}": {"-part_id": [NEGATIVE, "1", WORD], "-num_parts": COUNT},
    "hiendmae_benchmark report -o {out}": {"-tolerance_mm": POSITIVE},
    "hiendmae_benchmark probe -d 901 -w {weights} -device cpu": {
        "-d": ["444"], "-w": ["nowhere.pth", "{file}"], "-p": ["None"], "-c": ["2d", "4d"],
    },
    "hiendmae_benchmark_speed -d 901 -preset tiny -device cpu": {"-seconds": POSITIVE, "-batch_size": COUNT},
    "hiendmae_visualize -run {out} -i {raw} -o {out}": {"-seed": NATURAL, "-spacing": ["0 0 0", f"{NAN} 1 1", "1"],
                                                        "-voxel": ["1 1", "a b c"]},
    "hiendmae_demo -o {out}/demo": {"-o": ["{file}"], "-i": ["nowhere"], "-seed": NATURAL, "-device": ["tpu"]},
    "hiendmae_import_weights {official} -o {out}/w.pth -num_heads 2": {
        "-num_heads": COUNT, "-img_size": ["8 8", "a b c"], "-window_hu": ["2 1", "1"], "-d": ["901"],
        "--nnunet": ["-d 444", "-d 901 -p None"],
    },
    "hiendmae_doctor": {"-preset": ["huge"], "-device": ["tpu"]},
    "hiendmae_share push -i {weights}": {"-repo": ["name", "a/b/c", "../x"]},
}  # fmt: skip
SETTINGS = {"crop_size": "img_size", "labels": "Label budget", "f": "Fold"}
"""What flags are called once they are settings."""
CASES = [
    pytest.param(command, flag, value, id=f"{command.split(' -')[0]} {flag} {value}")
    for command, flags in FLAGS.items()
    for flag, values in flags.items()
    for value in values
]


def modules() -> dict[str, str]:
    from importlib.metadata import distribution

    scripts = distribution("nnunetv2_hiendmae").entry_points
    return {e.name: e.value for e in scripts if e.group == "console_scripts"}


@pytest.mark.parametrize(("command", "flag", "value"), CASES)
def test_impossible_values_get_one_line(
    command: str,
    flag: str,
    value: str,
    world: World,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def leave(code: int) -> NoReturn:  # hiendmae_pretrain ends its process at once
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.chdir(tmp_path)
    for kind in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / kind))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "file").touch()
    torch.save(official_state(), tmp_path / "official.pth")
    places = {"raw": world.root / "raw", "out": tmp_path, "weights": pretrained}
    places |= {"file": tmp_path / "file", "official": tmp_path / "official.pth"}
    words = command.format(**places).split()
    if flag in words:  # the flag's own value is replaced
        at = words.index(flag)
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("-")), len(words))
        del words[at:end]
    words += [flag, *(value.format(**places).split() if value else [""])]
    monkeypatch.setattr(sys, "argv", words)
    module, _, function = modules()[words[0]].partition(":")
    with pytest.raises(SystemExit) as end_of_program:
        getattr(importlib.import_module(module), function)()
    shown = capsys.readouterr()
    assert end_of_program.value.code == 2, shown.err
    (line,) = shown.err.strip().splitlines()
    assert line.startswith(f"{words[0]}") and "error:" in line
    name = flag.lstrip("-")
    told = (
        flag,
        name,
        SETTINGS.get(name, name),
        *value.format(**places).split(),
    )  # the flag, its setting, or the value
    assert any(word in line for word in told if len(word) > 1), line
    assert not (tmp_path / "results").exists()
