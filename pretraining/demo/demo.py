"""``hiendmae_demo``, from empty folder to page."""

from __future__ import annotations

import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from tqdm import tqdm

from nnunetv2_hiendmae import __version__
from nnunetv2_hiendmae.files import alone_in
from pretraining.demo.page import CAPTION, NAMES, dice, table, write_demo_page, write_own_page
from pretraining.demo.phantoms import LABELS, describe, write_case
from pretraining.demo.recipe import (
    LABELLED,
    RECIPES,
    UNLABELLED,
    Command,
    Recipe,
    Step,
    prediction,
    settings,
    steps,
)
from pretraining.demo.run import clear, environment, is_done, keep_or_clear, mark_done, own_folder, run_step
from pretraining.device import pick_device
from pretraining.doctor.environment import check_discovery, check_versions
from pretraining.visualize.cases import case_of, read_ct, read_image
from pretraining.visualize.source import Source, open_source

DISK_GIB, MEMORY_GIB = 0.5, 4.0
"""What the demo takes at most."""
OWN = "your_ct"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked for."""

    out: Path
    device: str
    seed: int
    image: Path | None = None
    """A CT to look at with the demo's networks."""


def demo(request: Request) -> None:
    """What the command does. ``ValueError`` for a user's mistake, ``Failed`` if a command fails."""
    out, recipe = request.out, RECIPES[request.device]
    check_machine(out, request.device)
    image = None if request.image is None else read_image(request.image)  # before minutes go by
    own_folder(out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the commands are ended, too
    with alone_in(out, "Wait for its end, or name another folder with -o."):
        todo = steps(recipe, request.device, request.seed, out)
        env = environment(out, recipe.loaders)
        if image is None or not is_done(out, todo[-1].name):  # any finished demo can look at a CT
            keep_or_clear(out, {**settings(recipe, request.device, request.seed), "version": __version__})
            write_phantoms(recipe, request.seed, out)
            for step in todo:
                run_step(step, out, env)
        source = open_source(next((out / "nnUNet_results" / UNLABELLED).glob("*/*/")), torch.device("cpu"))
        if request.image is None or image is None:
            page = show_demo(out, recipe, todo, source, request.seed)
        else:
            page = show_own(request, image, source, env)
    print(f"\nOpen {page} in a browser.")


def check_machine(out: Path, device: str) -> None:
    """``ValueError`` for what would end the demo later: versions, device, disk, memory."""
    for finding in (*check_versions(), *check_discovery()):
        if finding.level == "problem":
            raise ValueError(f"{finding.what.rstrip('.')}. Remedy: {finding.remedy}")
    pick_device(device, 1)
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 2**30
    if free < DISK_GIB:
        raise ValueError(f"-o {out}: {free:.1f} GiB are free there, the demo needs {DISK_GIB:g}. Name another folder.")
    memory = free_memory()
    if memory is not None and memory < MEMORY_GIB:
        raise ValueError(f"{memory:.1f} GiB of memory are free, the demo needs {MEMORY_GIB:g}. Close other programs.")


def free_memory(file: Path = Path("/proc/meminfo")) -> float | None:
    """GiB that programs can still take; None where it is not known."""
    with suppress(OSError):
        values = dict(line.split(":", 1) for line in file.read_text().splitlines())
        return int(values["MemAvailable"].split()[0]) / 2**20
    return None


def write_phantoms(recipe: Recipe, seed: int, out: Path) -> None:
    """Both data sets in nnU-Net's raw format, unless they are there."""
    print(f"\nSynthetic CT: {recipe.num_unlabelled} trunks without labels (data set 998), {recipe.num_labelled} with "
          f"labels and {recipe.num_test} to test on (999).", flush=True)  # fmt: skip
    if is_done(out, "phantoms"):
        print("  done before")
        return
    clear(out, ("nnUNet_raw",))
    kinds = (
        (UNLABELLED, "Tr", recipe.num_unlabelled, False),
        (LABELLED, "Tr", recipe.num_labelled, True),
        (LABELLED, "Ts", recipe.num_test, True),
    )
    cases = [(kind, i, *values) for kind, values in enumerate(kinds) for i in range(values[2])]
    for kind, i, dataset, split, _, labelled in tqdm(cases, leave=False, disable=None):
        folder, name = out / "nnUNet_raw" / dataset, f"phantom_{kind}{i:02d}"
        write_case(folder, name, (seed, kind, i), split, recipe.voxel_mm, labelled)
    describe(out / "nnUNet_raw" / UNLABELLED, recipe.num_unlabelled, {"background": 0})
    describe(out / "nnUNet_raw" / LABELLED, recipe.num_labelled, LABELS)
    mark_done(out, "phantoms")


def segmentation(file: Path) -> np.ndarray:
    """Labels ``(z, y, x)`` of a file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.uint8)


def show_demo(out: Path, recipe: Recipe, todo: list[Step], source: Source, seed: int) -> Path:
    """Table and page."""
    raw = out / "nnUNet_raw" / LABELLED
    truth = min((raw / "labelsTs").glob("*.nii.gz"))
    ct = raw / "imagesTs" / truth.name.replace(".nii.gz", "_0000.nii.gz")
    case = read_ct(ct, source.spacings[0], source.window_hu)
    found = {name: segmentation(out / "predictions" / trainer / truth.name) for trainer, name in NAMES.items()}
    print(f"\nDice on {recipe.num_test} test phantoms. {CAPTION}\n{table(dice(out))}")
    return write_demo_page(out, recipe, todo, source, case, segmentation(truth), found, seed)


def show_own(request: Request, image: sitk.Image, source: Source, env: dict[str, str]) -> Path:
    """A user's CT, turned as the phantoms lie, segmented and rebuilt."""
    assert request.image is not None
    out, name = request.out, request.image.resolve().name
    case = case_of(sitk.DICOMOrient(image, "LPS"), name, source.spacings[0], source.window_hu)
    step = Step(
        name=OWN,
        what=f"Both networks segment {name}.",
        makes=tuple(f"{OWN}/{trainer}" for trainer in NAMES),
        commands=tuple(
            Command(
                text=prediction(out / OWN / "images", out / OWN / trainer, trainer, request.device),
                files=f"{OWN}/{trainer}/ct.nii.gz",
            )
            for trainer in NAMES
        ),
        threads=2,
    )
    clear(out, (OWN, f"logs/{OWN}.done"))
    (out / OWN / "images").mkdir(parents=True)
    case.save(case.volume, out / OWN / "images" / "ct_0000.nii.gz")
    run_step(step, out, env)
    found = {shown: segmentation(out / OWN / trainer / "ct.nii.gz") for trainer, shown in NAMES.items()}
    return write_own_page(out, source, case, found, request.seed)
