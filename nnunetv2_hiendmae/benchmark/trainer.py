"""nnU-Net's own trainers with the benchmark's iteration budget, and otherwise as nnU-Net ships them.

The budget comes from the ``hiendmae`` block of the plans (``BUDGET``); nothing else of it is read. nnU-Net has no
other way to set iterations.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import (
    nnUNet_Primus_M_Trainer,
    nnUNet_PrimusV2M_Trainer,
    nnUNet_PrimusV3S_Trainer,
)
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

from nnunetv2_hiendmae.nnunet.settings import BLOCK, BUDGET, FineTuneSettings
from nnunetv2_hiendmae.nnunet.trainer import fewer_augmentations


class Budget(nnUNetTrainer):
    """Epochs, iterations and augmentation as the plans say; a warm-up of 50 epochs is at most a tenth of the epochs."""

    reads_budget = True

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        block = self.configuration_manager.configuration.get(BLOCK, {})
        self.budget = FineTuneSettings(**{name: block[name] for name in BUDGET if name in block})
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
            setattr(self, name, block.get(name, getattr(self, name)))
        if hasattr(self, "warmup_duration_whole_net"):
            warmup = self.warmup_duration_whole_net  # type: ignore[has-type]
            self.warmup_duration_whole_net = max(1, min(warmup, self.num_epochs // 10))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        choices = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return fewer_augmentations(self, choices, self.budget)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        if self.budget.no_augmentation:
            return nnUNetTrainerNoDA.get_training_transforms(*args, **kwargs)
        return super().get_training_transforms(*args, **kwargs)


class nnUNetTrainerBudget(Budget):
    """``nnUNetTrainer`` under the plans' budget."""


class nnUNetPrimusBudget(Budget, nnUNet_Primus_M_Trainer):
    """Primus-M under the plans' budget."""


class nnUNetPrimusV2Budget(Budget, nnUNet_PrimusV2M_Trainer):
    """PrimusV2-M under the plans' budget."""


class nnUNetPrimusV3Budget(Budget, nnUNet_PrimusV3S_Trainer):
    """PrimusV3-S under the plans' budget."""
