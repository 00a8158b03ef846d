"""The trainers under their public name."""

from nnunetv2_hiendmae.nnunet.trainer import nnUNetTrainerHiEndMAE, nnUNetTrainerHiEndMAE_scratch

__all__ = ["nnUNetTrainerHiEndMAE", "nnUNetTrainerHiEndMAE_scratch"]
