"""The machine and the installation: folders, versions, how nnU-Net finds our classes, device, disk, memory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from pretraining.config import BYTES_OF_STATE, PRESETS
from pretraining.doctor.finding import Finding
from pretraining.model import HiEndMAE
from pretraining.processes import usable_cores

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
DOOR = Path("training/nnUNetTrainer/variants/hiendmae_trainer.py")
"""Where an installed wheel puts the module through which nnU-Net finds our trainers, below nnunetv2."""
TRAINER = "nnUNetTrainerHiEndMAE"
BYTES_IN_CHECKPOINT = 12
"""Of a parameter: itself and AdamW's two moments, in fp32."""
GIB = 2**30


def check_folders() -> Iterator[Finding]:
    """nnU-Net's three variables, and whether what they name can be read and written."""
    for name in FOLDERS:
        value = os.environ.get(name)
        if not value:
            yield Finding("problem", f"The environment variable {name} is not set.", f"export {name}=/your/{name}")
        elif not Path(value).is_dir():
            yield Finding("problem", f"{name}={value} is no folder.", f"mkdir -p {value}")
        elif name != "nnUNet_raw" and not os.access(value, os.W_OK):
            yield Finding("problem", f"{name}={value} cannot be written.", f"chmod u+w {value}, or name another folder")
        else:
            yield Finding("ok", f"{name}={value}, {shutil.disk_usage(value).free / GIB:.0f} GiB free")


def check_versions() -> Iterator[Finding]:
    """Python, and every package that we ask for, in the version that we ask for."""
    yield Finding("ok", f"Python {sys.version.split()[0]}, nnunetv2_hiendmae {version('nnunetv2_hiendmae')}")
    for text in requires("nnunetv2_hiendmae") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            yield Finding("problem", f"{needed.name} is not installed.", f"pip install '{needed}'")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            yield Finding(
                "problem", f"{needed.name} {found} is installed; {needed} is needed.", f"pip install '{needed}'"
            )
        elif needed.name in ("nnunetv2", "torch"):
            yield Finding("ok", f"{needed.name} {found}")


def check_torchvision() -> Iterator[Finding]:
    """nnU-Net's search for trainers imports torchvision (through timm), which fails if it does not fit torch."""
    if importlib.util.find_spec("torchvision") is None:
        return
    command = [sys.executable, "-W", "ignore", "-c", "import torchvision; print(torchvision.__version__)"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"
        yield Finding(
            "problem",
            f"torchvision {version('torchvision')} cannot be imported beside torch {version('torch')} ({reason}); "
            f"nnU-Net then finds no trainers.",
            "pip install --force-reinstall torch torchvision, both in one command and from one index",
        )
    else:
        yield Finding("ok", f"torchvision {done.stdout.strip()} fits torch {version('torch')}")


def check_device(device: str | None) -> Iterator[Finding]:
    """Whether torch sees the device that is asked for; None: the GPU, if there is one."""
    if device is None and not torch.cuda.is_available():
        what = (
            f"torch finds no CUDA device, which our and nnU-Net's commands use by default; {usable_cores()} CPU cores."
        )
        yield Finding("warning", what, "-device cpu (and -preset tiny), or a CUDA build of torch")
    elif device is None:
        yield from check_device("cuda")
    elif device == "cuda" and not torch.cuda.is_available():
        yield Finding("problem", "torch finds no CUDA device.", "install a CUDA build of torch, or use -device cpu")
    elif device == "cuda":
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield Finding("ok", f"GPU {i}: {properties.name}, {properties.total_memory / GIB:.0f} GiB")
    elif device == "mps" and not torch.backends.mps.is_available():
        yield Finding("problem", "torch finds no Apple GPU.", "use -device cpu")
    else:
        yield Finding("ok", f"device {device}, {usable_cores()} cores")


def check_preset(preset_name: str, device: str) -> Iterator[Finding]:
    """Memory and disk that pre-training with a preset takes at least."""
    preset = PRESETS[preset_name]
    config = preset.model(
        crop_size=preset.crop_size, patch_size=preset.encoder.patch_size, in_channels=1, mask_ratio=0.75
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in HiEndMAE(config).parameters())
    states, checkpoint = parameters * BYTES_OF_STATE / GIB, parameters * BYTES_IN_CHECKPOINT / GIB
    there = memory(device)
    words = f"{preset_name}: {parameters / 1e6:.0f} M parameters; states take {states:.1f} GiB, activations come on top"
    if there is None:
        yield Finding("ok", words)
    elif states > there:
        yield Finding(
            "problem", f"{words}; {device} has {there:.1f} GiB.", "a smaller -preset: base_p16, small_p12, tiny"
        )
    else:
        yield Finding("ok", f"{words}; {device} has {there:.1f} GiB")
    results = os.environ.get("nnUNet_results", "")
    if Path(results).is_dir() and shutil.disk_usage(results).free / GIB < 3 * checkpoint:
        yield Finding(
            "problem",
            f"Checkpoints of {preset_name} take {3 * checkpoint:.1f} GiB (two, and one being written); nnUNet_results "
            f"has less.",
            "free some space, or name another nnUNet_results",
        )


def memory(device: str) -> float | None:
    """GiB of the first GPU, or of the machine; None where it is not known."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not hasattr(os, "sysconf") or not set(names) <= set(os.sysconf_names):
        return None
    return os.sysconf(names[0]) * os.sysconf(names[1]) / GIB


def check_discovery() -> Iterator[Finding]:
    """Whether nnU-Net's own search finds our trainer, and through which door."""
    import warnings

    import nnunetv2
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import nnunetv2_hiendmae

    doors = Path(nnunetv2_hiendmae.__path__[0]) / "doors" / "trainer"
    door, outside = Path(nnunetv2.__path__[0]) / DOOR, os.environ.get("nnUNet_extTrainer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, which the search imports
            recursive_find_trainer_class_by_name(TRAINER)
    except Exception as error:  # the search imports whatever lies in the folders
        remedy = f"export nnUNet_extTrainer={doors}" if not door.is_file() else "see the lines on versions above"
        yield Finding("problem", f"nnU-Net does not find {TRAINER} ({str(error).splitlines()[0]}).", remedy)
        return
    way = f"through {door}" if door.is_file() else f"through nnUNet_extTrainer={outside}"
    yield Finding("ok", f"nnU-Net finds {TRAINER} {way}")
