"""nnU-Net's own trainers with the benchmark's iteration budget, and otherwise as nnU-Net ships them.

The budget comes from the ``hiendmae`` block of the plans (``num_epochs``, ``num_iterations_per_epoch``,
``num_val_iterations_per_epoch``); nothing else of the block is read. nnU-Net has no other way to set iterations.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_M_Trainer, nnUNet_PrimusV2M_Trainer

from nnunetv2_hiendmae.settings import BLOCK

BUDGET = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
"""Settings that every arm of a benchmark shares."""


class nnUNetTrainerBudget(nnUNetTrainer):
    """``nnUNetTrainer`` for as many iterations as the plans say."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        take_budget(self)


class nnUNetPrimusBudget(nnUNet_Primus_M_Trainer):
    """Primus-M for as many iterations as the plans say; its warm-up of 50 epochs is at most a tenth of them."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        take_budget(self)


class nnUNetPrimusV2Budget(nnUNet_PrimusV2M_Trainer):
    """PrimusV2-M for as many iterations as the plans say; its warm-up of 50 epochs is at most a tenth of them."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        take_budget(self)


def take_budget(trainer: Any) -> None:
    """Set a trainer's epochs and iterations to those of its plans, and shorten a warm-up that would not fit."""
    block = trainer.configuration_manager.configuration.get(BLOCK, {})
    for name in BUDGET:
        setattr(trainer, name, block.get(name, getattr(trainer, name)))
    if hasattr(trainer, "warmup_duration_whole_net"):
        trainer.warmup_duration_whole_net = max(1, min(trainer.warmup_duration_whole_net, trainer.num_epochs // 10))
