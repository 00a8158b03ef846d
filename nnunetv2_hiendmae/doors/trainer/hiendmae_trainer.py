"""Door through which nnU-Net finds our trainers (also when this folder is named in ``nnUNet_extTrainer``)."""

from nnunetv2_hiendmae.benchmark.trainer import nnUNetPrimusBudget, nnUNetPrimusV2Budget, nnUNetTrainerBudget
from nnunetv2_hiendmae.trainer import nnUNetTrainerHiEndMAE, nnUNetTrainerHiEndMAE_scratch

__all__ = [
    "nnUNetPrimusBudget",
    "nnUNetPrimusV2Budget",
    "nnUNetTrainerBudget",
    "nnUNetTrainerHiEndMAE",
    "nnUNetTrainerHiEndMAE_scratch",
]
