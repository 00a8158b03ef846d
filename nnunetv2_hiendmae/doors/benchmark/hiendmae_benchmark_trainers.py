"""Door through which nnU-Net finds the trainers of ``hiendmae_benchmark``.

nnU-Net imports every module on its way to a trainer. Nothing is imported here before one of these names is asked for,
so what another version of nnU-Net may lack (Primus, say) never stands between it and our own trainer.
"""

from typing import Any

TRAINERS = ("nnUNetPrimusBudget", "nnUNetPrimusV2Budget", "nnUNetPrimusV3Budget", "nnUNetTrainerBudget")


def __getattr__(name: str) -> Any:
    if name not in TRAINERS:
        raise AttributeError(name)
    from nnunetv2_hiendmae.benchmark import trainer

    return getattr(trainer, name)
