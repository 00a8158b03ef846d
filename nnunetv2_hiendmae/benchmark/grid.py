"""The grid of a benchmark as data: which arms run on which data, folds, label budgets and seeds.

``hiendmae_benchmark plan`` writes it as ``grid.json``, which may be edited before ``plan`` reads it again.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.nnunet.settings import BUDGET, FineTuneSettings

GRID_FILE = "grid.json"
ALL_LABELS = "all"
NAME = re.compile(r"[A-Za-z0-9]+([._-]?[A-Za-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    """Short; letters, digits, single '_', '-' and '.'. Part of the plans' name."""
    trainer: str
    """Any trainer that nnU-Net finds (``-tr``)."""
    plans: str = "nnUNetPlans"
    """Existing plans to start from; their preprocessed data are used."""
    weights: str | None = None
    """Weights file of a Hi-End-MAE arm; None leaves the search to the trainer."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further keys of the plans' ``hiendmae`` block, without those of the budget."""
    num_epochs: int | None = None
    """Of this arm alone, for a comparison at equal time. None: the grid's."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"Arm name '{self.name}' must be letters and digits with single '_', '-' or '.' between.")
        unknown = set(self.settings) - {f.name for f in fields(FineTuneSettings)}
        if unknown:
            raise ValueError(f"Arm {self.name}: unknown settings {sorted(unknown)}; see 'hiendmae_plan -h'.")
        if set(self.settings) & set(BUDGET):
            raise ValueError(f"Arm {self.name}: {', '.join(BUDGET)} belong to the grid, not to settings.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a cell of the grid."""

    dataset: str
    configuration: str
    fold: int
    """The fold whose validation cases are predicted."""
    labels: int | str
    """Labelled training cases: a number, 'n%', or 'all'."""
    seed: int
    """Which subset of the training cases is labelled. 0 for 'all', where there is one."""
    arm: Arm

    @property
    def name(self) -> str:
        cell = f"{self.dataset}/{self.configuration}/fold {self.fold}/{self.labels} labels/seed {self.seed}"
        return f"{cell}/{self.arm.name}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Everything that is to be run. The product of the lists below is the list of runs."""

    name: str
    """Short; part of the name of the plans that ``plan`` writes, so that benchmarks do not mix."""
    datasets: tuple[str, ...]
    """Data set names, ``DatasetXXX_Name``."""
    arms: tuple[Arm, ...]
    """The first one is what the others are compared with."""
    configurations: tuple[str, ...] = ("3d_fullres",)
    folds: tuple[int, ...] = (0,)
    labels: tuple[int | str, ...] = (ALL_LABELS,)
    """Label budgets: numbers of cases, percentages such as '10%', and 'all'."""
    seeds: tuple[int, ...] = (0,)
    """Subsets drawn for each label budget. nnU-Net seeds no training, so this is the variation there is."""
    num_epochs: int | None = None
    """The budget of every arm. None: each trainer's own (nnU-Net: 1000)."""
    num_iterations_per_epoch: int | None = None
    """None: each trainer's own (nnU-Net: 250)."""
    num_val_iterations_per_epoch: int | None = None
    """None: each trainer's own (nnU-Net: 50)."""
    no_mirroring: bool | None = None
    """True: no arm flips, for left and right organs that look alike. None: nnU-Net's default, which does."""
    no_augmentation: bool | None = None
    """True: every arm trains on crops as they are, for budgets too short to gain from augmentation."""
    patch_size: tuple[int, int, int] | None = None
    """Of every arm, voxels ``(z, y, x)``. None: that of each arm's plans."""
    batch_size: int | None = None
    """Of every arm. None: that of each arm's plans."""
    device: str = "cuda"
    """``-device`` of the training commands."""

    def __post_init__(self) -> None:
        for name in ("datasets", "configurations", "folds", "labels", "seeds", "arms", "patch_size"):
            if (values := getattr(self, name)) is None:
                continue
            if not isinstance(values, (list, tuple)):
                raise ValueError(f"{name}={values!r} must be a list.")
            object.__setattr__(self, name, tuple(values))
        if not NAME.fullmatch(self.name):
            raise ValueError(f"Grid name '{self.name}' must be letters and digits with single '_', '-' or '.' between.")
        for name in ("datasets", "configurations", "folds", "labels", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must not be empty or repeat a value.")
            if name in ("datasets", "configurations") and not all(isinstance(value, str) for value in values):
                raise ValueError(f"{name}={list(values)} must be names.")
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"The arms {names} need different names.")
        if self.device not in ("cuda", "cpu", "mps"):
            raise ValueError(f"device='{self.device}' must be cuda, cpu or mps.")
        for labels in self.labels:
            check_labels(labels)
        for fold in self.folds:
            check_count("folds", fold, 0)
        for seed in self.seeds:
            check_count("seeds", seed, 0)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        for edge in self.patch_size or ():
            check_count("patch_size", edge)
        for arm in self.arms:
            FineTuneSettings(**self.budget_of(arm))

    @property
    def budget(self) -> dict[str, Any]:
        """The budget's settings that are given."""
        return {name: getattr(self, name) for name in BUDGET if getattr(self, name) is not None}

    def budget_of(self, arm: Arm) -> dict[str, Any]:
        """The budget's settings that are given for one arm."""
        return self.budget | ({} if arm.num_epochs is None else {"num_epochs": arm.num_epochs})

    def runs(self) -> list[Run]:
        """Every run, arms innermost, so that an interrupted benchmark has whole comparisons."""
        return [
            Run(dataset=d, configuration=c, fold=f, labels=n, seed=s, arm=arm)
            for d in self.datasets
            for c in self.configurations
            for f in self.folds
            for n in self.labels
            for s in (self.seeds if n != ALL_LABELS else (0,))
            for arm in self.arms
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def check_labels(labels: int | str) -> None:
    """``ValueError`` unless a label budget is a positive number, a percentage, or 'all'."""
    if type(labels) is int and labels > 0:
        return
    percent = str(labels).removesuffix("%")
    if labels == ALL_LABELS or (str(labels) != percent and percent.isdigit() and 0 < int(percent) < 100):
        return
    raise ValueError(f"Label budget {labels!r} must be a number of cases, a percentage such as 10%, or all.")


def parse_labels(word: str) -> int | str:
    """A label budget from the command line."""
    labels = int(word) if word.isdigit() else word
    check_labels(labels)
    return labels


def read_grid(file: Path) -> Grid:
    """Read ``grid.json``.

    Raises:
        ValueError: no such file, no JSON, unknown keys or impossible values; names the file.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values["arms"] = tuple(Arm(**arm) for arm in values["arms"])
        return Grid(**values)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist. Write one with 'hiendmae_benchmark plan'.") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
