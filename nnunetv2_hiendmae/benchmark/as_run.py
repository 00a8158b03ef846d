"""How the arms were trained in fact, from the ``debug.json`` that nnU-Net writes when a training starts."""

from __future__ import annotations

import hashlib
import re

from nnunetv2_hiendmae.benchmark.collect import Result
from nnunetv2_hiendmae.benchmark.grid import Grid
from nnunetv2_hiendmae.benchmark.tables import Table
from nnunetv2_hiendmae.files import read_json

PROPERTIES = (
    "num_epochs",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "batch_size",
    "initial_lr",
    "weight_decay",
    "enable_deep_supervision",
    "oversample_foreground_percent",
    "lr_scheduler",
    "optimizer",
    "loss",
    "device",
    "gpu_name",
)
AUGMENTATION = "dataloader_train.generator.transforms"
NOT_RECORDED, MISSING = "not recorded", "missing"


def as_run_tables(grid: Grid, results: list[Result]) -> list[Table]:
    """One table for each data set and configuration: what was set in the trainers, arms side by side."""
    tables = []
    for dataset in grid.datasets:
        for configuration in grid.configurations:
            here = [r for r in results if (r.run.dataset, r.run.configuration) == (dataset, configuration)]
            columns = [[trainer_values(r) for r in here if r.run.arm == arm and has_debug(r)] for arm in grid.arms]
            rows = []
            for name in (*PROPERTIES, "augmentation"):
                words = [one_of([values[name] for values in column]) for column in columns]
                verdict = "–" if {NOT_RECORDED, MISSING} & set(words) else "same" if len(set(words)) == 1 else "differs"
                rows.append([name, *words, verdict])
            tables.append(
                Table(
                    name=f"as_run_{dataset}_{configuration}",
                    title=f"As run: {dataset}, {configuration}",
                    note="From each run's debug.json. The augmentation is a hash of its transforms and their numbers; "
                    "nnU-Net does not record it in runs without loader processes (nnUNet_n_proc_DA=0).",
                    header=["property", *(arm.name for arm in grid.arms), "arms"],
                    rows=rows,
                )
            )
    return tables


def has_debug(result: Result) -> bool:
    """Whether the run counts, and nnU-Net left a ``debug.json``."""
    return result.status == "finished" and (result.folder / "debug.json").is_file()


def trainer_values(result: Result) -> dict[str, str]:
    """What ``debug.json`` says of ``PROPERTIES``, and a hash of the training augmentation."""
    debug = read_json(result.folder / "debug.json")
    values = {name: short(str(debug.get(name, "–"))) for name in PROPERTIES}
    if AUGMENTATION not in debug:
        return {**values, "augmentation": NOT_RECORDED}
    # Deep supervision makes its small targets, our trainer air of padding, in the same list; that is no augmentation.
    transforms = re.sub(r", DownsampleSegForDSTransform\( ds_scales = .*?\]\] \)", "", debug[AUGMENTATION])
    transforms = re.sub(r"PadWithAir\(\), ", "", transforms)
    return {**values, "augmentation": hashlib.sha256(transforms.encode()).hexdigest()[:12]}


def short(text: str) -> str:
    """A number or name as it is; of a printed object its class."""
    if not re.search("[<(]", text):
        return text
    name = re.split(r"[\s(]", text.strip("<> "), maxsplit=1)[0]
    return name.rpartition(".")[2]


def one_of(values: list[str]) -> str:
    """What all runs of an arm have, or what they have between them."""
    return " / ".join(sorted(set(values))) or MISSING
