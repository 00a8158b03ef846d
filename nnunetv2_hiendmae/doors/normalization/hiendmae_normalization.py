"""Door through which nnU-Net finds our normalisation scheme."""

from nnunetv2_hiendmae.nnunet.normalization import HUWindowNormalization

__all__ = ["HUWindowNormalization"]
