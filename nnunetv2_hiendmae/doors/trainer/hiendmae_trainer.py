"""Door through which nnU-Net finds our trainers (also when this folder is named in ``nnUNet_extTrainer``)."""

from nnunetv2_hiendmae.nnunet.trainer import nnUNetTrainerHiEndMAE, nnUNetTrainerHiEndMAE_scratch

__all__ = ["nnUNetTrainerHiEndMAE", "nnUNetTrainerHiEndMAE_scratch"]
