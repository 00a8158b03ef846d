"""Make Hi-End-MAE weights from unlabelled CT that nnU-Net v2 preprocessed."""

from pretraining.config import ModelConfig
from pretraining.model import HiEndMAE, HiEndMAEOutput

__all__ = ["HiEndMAE", "HiEndMAEOutput", "ModelConfig"]
