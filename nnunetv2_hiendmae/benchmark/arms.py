"""Arms: the default ones, the plans they train under, the command that trains them, and what differs between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.benchmark.grid import GRID_FILE, Arm, Grid, Run
from nnunetv2_hiendmae.benchmark.record import file_sha256
from nnunetv2_hiendmae.benchmark.splits import split_index, write_json
from nnunetv2_hiendmae.checks import MAX_COUNT
from nnunetv2_hiendmae.files import preprocessed_folder, read_plans, results_folder
from nnunetv2_hiendmae.nnunet.plans import make_plans
from nnunetv2_hiendmae.nnunet.settings import BLOCK
from nnunetv2_hiendmae.nnunet.trainer import nnUNetTrainerHiEndMAE
from nnunetv2_hiendmae.weights.file import load_weights

# name, trainer, trainer under a budget, plans
DEFAULTS = (
    ("nnunet", "nnUNetTrainer", "nnUNetTrainerBudget", "nnUNetPlans"),
    ("resenc_l", "nnUNetTrainer", "nnUNetTrainerBudget", "nnUNetResEncUNetLPlans"),
    ("primus_m", "nnUNet_Primus_M_Trainer", "nnUNetPrimusBudget", "nnUNetPlans"),
    ("primusv2_m", "nnUNet_PrimusV2M_Trainer", "nnUNetPrimusV2Budget", "nnUNetPlans"),
    ("scratch", "nnUNetTrainerHiEndMAE_scratch", "nnUNetTrainerHiEndMAE_scratch", "nnUNetPlans"),
    ("hiendmae", "nnUNetTrainerHiEndMAE", "nnUNetTrainerHiEndMAE", "nnUNetPlans"),
)

# As DEFAULTS; taken when named. Weights of the last one are of another kind of encoder than those of hiendmae.
PRIMUS = (
    ("primus_v3_s", "nnUNet_PrimusV3S_Trainer", "nnUNetPrimusV3Budget", "nnUNetPlans"),
    ("primus_hiendmae", "nnUNetTrainerHiEndMAE", "nnUNetTrainerHiEndMAE", "nnUNetPlans"),
)

# name, trainer, settings; taken when named
CONTROLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("plain_mae", "nnUNetTrainerHiEndMAE", {}),
    ("frozen", "nnUNetTrainerHiEndMAE", {"frozen_epochs": MAX_COUNT}),
    ("identity", "nnUNetTrainerHiEndMAE_scratch", {"identity_blocks": True}),
)

PRETRAINED_SHA256 = "pretrained_weights_sha256"
"""Key that the plans of an arm with nnU-Net's ``-pretrained_weights`` get, so that other weights are another run."""

REMEDY = "Plan again, or remove it if hiendmae_benchmark wrote it."

# What an nnU-Net trainer can do otherwise than nnUNetTrainer, and readers should know.
METHODS = (
    "build_network_architecture",
    "configure_optimizers",
    "_build_loss",
    "train_step",
    "get_training_transforms",
    "get_validation_transforms",
    "configure_rotation_dummyDA_mirroring_and_inital_patch_size",
    "get_dataloaders",
    "do_split",
    "perform_actual_validation",
)


def default_arms(
    plans: str,
    weights: str | None,
    budget: bool,
    names: Sequence[str] | None = None,
    plain_mae: str | None = None,
    primus_hiendmae: str | None = None,
) -> tuple[Arm, ...]:
    """Arms of a comparison with nnU-Net, in the order of ``names``: the six of ``DEFAULTS`` if none are given.

    Args:
        plans: of all but ResEnc-L.
        weights: of the arms that start from Hi-End-MAE.
        budget: whether trainers must read the grid's budget.
        names: of ``DEFAULTS``, ``PRIMUS`` and ``CONTROLS``.
        plain_mae, primus_hiendmae: weights of the arms of these names.

    Raises:
        ValueError: an unknown name, or an arm without its weights, or weights without their arm.
    """
    arms = {
        name: Arm(
            name=name,
            trainer=budgeted if budget else trainer,
            plans=plans if own == "nnUNetPlans" else own,
            weights=weights if name == "hiendmae" else None,
        )
        for name, trainer, budgeted, own in DEFAULTS + PRIMUS
    }
    names = names or [name for name, *_ in DEFAULTS]
    for name, trainer, settings in CONTROLS:
        start = weights if name == "frozen" else None
        arms[name] = Arm(name=name, trainer=trainer, plans=plans, weights=start, settings=dict(settings))
    unknown = sorted(set(names) - set(arms))
    if unknown:
        raise ValueError(f"-arms {' '.join(unknown)}: there are {', '.join(arms)}.")
    if weights and not {"hiendmae", "frozen"} & set(names):
        raise ValueError("-weights is for the arms hiendmae and frozen; name one of them in -arms, or leave it out.")
    for name, file in (("plain_mae", plain_mae), ("primus_hiendmae", primus_hiendmae)):
        if (name in names) != (file is not None):
            raise ValueError(f"-arms {name} needs -{name} FILE, the weights of that arm, and the other way round.")
        arms[name] = replace(arms[name], weights=file)
    return tuple(arms[name] for name in names)


@lru_cache
def trainer_class(name: str) -> type[nnUNetTrainer]:
    """The class that ``-tr name`` trains with. ``ValueError`` if nnU-Net finds none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # nnU-Net's search imports torchvision, which gives one
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        raise ValueError(f"nnU-Net finds no trainer '{name}'.") from None


def plans_name(grid: Grid, arm: Arm) -> str:
    """Plans that an arm trains under: its own, or those that ``write_plans`` makes of them."""
    changes = grid.budget_of(arm) or grid.patch_size or grid.batch_size or arm.settings or arm.weights
    return f"{arm.plans}_{grid.name}_{arm.name}" if changes else arm.plans


def needs_block(arm: Arm) -> bool:
    """Whether the arm's weights go into the plans (Hi-End-MAE) instead of nnU-Net's ``-pretrained_weights``."""
    if arm.weights is None:
        return False
    cls = trainer_class(arm.trainer)
    if issubclass(cls, nnUNetTrainerHiEndMAE) and not cls.pretrained:
        raise ValueError(f"Arm {arm.name}: {arm.trainer} takes no weights.")
    return issubclass(cls, nnUNetTrainerHiEndMAE)


def write_plans(grid: Grid, dataset: str, arm: Arm) -> Path:
    """Write the arm's plans into the preprocessed folder if they differ from what is there; returns the file.

    Raises:
        ValueError: no such plans, or settings, weights or sizes that cannot be.
    """
    folder = preprocessed_folder(dataset)
    source, name = folder / f"{arm.plans}.json", plans_name(grid, arm)
    if not source.is_file():
        raise ValueError(
            f"Arm {arm.name}: {source} does not exist. Run 'nnUNetv2_plan_and_preprocess' for these plans, or take "
            f"the arm out of the grid."
        )
    plans = read_plans(source, REMEDY)
    if any(BLOCK in configuration for configuration in plans["configurations"].values()):
        raise ValueError(
            f"Arm {arm.name}: {source} has settings of hiendmae_plan, which not every trainer reads. Name the plans it "
            f"was made from, and put settings and budget into the grid."
        )
    target = folder / f"{name}.json"
    if target == source:
        return source
    settings = {**grid.budget_of(arm), **arm.settings}
    if needs_block(arm):
        weights = load_weights(str(arm.weights))
        settings |= {"weights": str(weights.path.absolute()), "weights_sha256": weights.sha256}
    elif arm.weights is not None:
        file = Path(arm.weights)
        if not file.is_file():
            raise ValueError(f"Arm {arm.name}: the weights file {file} does not exist.")
        plans = {**plans, PRETRAINED_SHA256: file_sha256(file)}
    plans = make_plans(plans, name, settings, grid.patch_size, grid.batch_size)
    if not target.is_file() or read_plans(target, REMEDY) != plans:
        write_json(target, plans)
    return target


def check_planned(grid: Grid, folder: Path) -> None:
    """``ValueError`` if the grid in ``folder`` was edited, and not planned again: its plans are not what it says."""
    for dataset in grid.datasets:
        for arm in grid.arms:
            file = preprocessed_folder(dataset) / f"{plans_name(grid, arm)}.json"
            for configuration in (name for name in grid.configurations if name != "2d"):
                planned = configuration_of(file, configuration)
                block = planned.get(BLOCK, {})
                settings = {name: value for name, value in block.items() if name not in ("weights", "weights_sha256")}
                named = Path(arm.weights or "").parts if needs_block(arm) else ()
                if (
                    settings != {**grid.budget_of(arm), **arm.settings}
                    or Path(block.get("weights", "")).parts[-len(named) or None :] != named
                    or list(grid.patch_size or planned["patch_size"]) != planned["patch_size"]
                    or (grid.batch_size or planned["batch_size"]) != planned["batch_size"]
                ):
                    raise ValueError(
                        f"Arm {arm.name}: {file} is not what {folder / GRID_FILE} says. Was that edited? Then run "
                        f"'hiendmae_benchmark plan -o {folder} -grid {folder / GRID_FILE}'."
                    )


def configuration_of(plans_file: Path, configuration: str) -> dict[str, Any]:
    """One configuration of a plans file, inheritance resolved. ``ValueError`` if it has none of that name."""
    plans = read_plans(plans_file, REMEDY)
    if configuration not in plans["configurations"]:
        names = ", ".join(plans["configurations"])
        raise ValueError(f"{plans_file} has no configuration {configuration}; it has {names}.")
    return PlansManager(plans).get_configuration(configuration).configuration


def plans_file(grid: Grid, run: Run) -> Path:
    """The plans file that a run trains under."""
    return preprocessed_folder(run.dataset) / f"{plans_name(grid, run.arm)}.json"


def fold_folder(grid: Grid, run: Run) -> Path:
    """Where nnU-Net writes the run: ``…/<trainer>__<plans>__<configuration>/fold_<entry>``."""
    index = split_index(preprocessed_folder(run.dataset), run.fold, run.labels, run.seed)
    model = f"{run.arm.trainer}__{plans_name(grid, run.arm)}__{run.configuration}"
    return results_folder() / run.dataset / model / f"fold_{index}"


def train_command(grid: Grid, run: Run) -> list[str]:
    """The plain ``nnUNetv2_train`` command of a run."""
    index = split_index(preprocessed_folder(run.dataset), run.fold, run.labels, run.seed)
    words = ["nnUNetv2_train", run.dataset, run.configuration, str(index)]
    words += ["-tr", run.arm.trainer, "-p", plans_name(grid, run.arm), "-device", grid.device]
    if run.arm.weights is not None and not needs_block(run.arm):
        words += ["-pretrained_weights", str(Path(run.arm.weights).absolute())]
    return words


def replaced_methods(trainer: str) -> list[str]:
    """Which of ``METHODS`` a trainer does not take from ``nnUNetTrainer``."""
    cls = trainer_class(trainer)
    return [name for name in METHODS if getattr(cls, name) is not getattr(nnUNetTrainer, name)]


def differences(grid: Grid, dataset: str, configuration: str) -> dict[str, dict[str, str]]:
    """What is set for each arm, by arm and then by property; everything else is nnU-Net's default for all."""
    table = {}
    for arm in grid.arms:
        file = preprocessed_folder(dataset) / f"{plans_name(grid, arm)}.json"
        values = configuration_of(file, configuration)
        block = values.get(BLOCK, {})
        ours = issubclass(trainer_class(arm.trainer), nnUNetTrainerHiEndMAE)
        table[arm.name] = {
            "trainer": arm.trainer,
            "plans": plans_name(grid, arm),
            "data": values["data_identifier"],
            "spacing (mm)": " × ".join(f"{s:.3g}" for s in values["spacing"]),
            "patch size": " × ".join(str(s) for s in values["patch_size"]),
            "batch size": str(values["batch_size"]),
            "network of the plans": "not used" if ours else network_words(values["architecture"]),
            "weights": str(block.get("weights_sha256") or read_plans(file, REMEDY).get(PRETRAINED_SHA256) or "none"),
            "settings": ", ".join(f"{k}={v}" for k, v in arm.settings.items()) or "none",
            "replaces of nnUNetTrainer": ", ".join(replaced_methods(arm.trainer)) or "nothing",
        }
    return table


def network_words(architecture: dict[str, Any]) -> str:
    """Class and depth of the network in the plans."""
    name = architecture["network_class_name"].rpartition(".")[2]
    return f"{name}, {architecture['arch_kwargs']['n_stages']} stages"
