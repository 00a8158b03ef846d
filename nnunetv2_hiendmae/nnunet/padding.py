"""Air beyond the image in training patches, where nnU-Net pads with 0; prediction's padding the network fills itself.

nnU-Net's 0 is the mean of the foreground after ``CTNormalization``, soft tissue to an encoder that was pre-trained on
crops with air around the image. Augmentation changes the 0, so it must be replaced before.
"""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform
from torch import Tensor

from nnunetv2_hiendmae.intensity import CanonicalIntensity


class PadWithAir(ImageOnlyTransform):
    """A step that is no augmentation: ``hiendmae_benchmark`` leaves it out where it compares the augmentation."""

    def __repr__(self) -> str:
        return "PadWithAir()"


class FillPadding(PadWithAir):
    """Air where the data loader padded ``(C, H, W, D)`` with 0."""

    def __init__(self, intensity: CanonicalIntensity) -> None:
        super().__init__()
        self.intensity = intensity

    @torch.no_grad()
    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        return self.intensity.fill_padding(img[None])[0]


class Shift(PadWithAir):
    """Add a constant to each channel."""

    def __init__(self, constants: Tensor) -> None:
        super().__init__()
        self.constants = constants

    def _apply_to_image(self, img: Tensor, **params: Any) -> Tensor:
        return img + self.constants


def pad_with_air(transforms: ComposeTransforms, intensity: CanonicalIntensity) -> ComposeTransforms:
    """nnU-Net's transforms with padding turned into air: the data loader's first, then that of rotation and scaling.

    The latter fills with 0 as well. Around it air is 0, so its interpolation at the image's border is right too.
    """
    if intensity.pads_with_air:
        return transforms
    steps, air = list(transforms.transforms), intensity.stored_air[0]
    spatial = [i for i, step in enumerate(steps) if isinstance(step, (SpatialTransform, Convert2DTo3DTransform))]
    if spatial:
        end = spatial[-1] + 1
        steps = [Shift(-air), *steps[:end], Shift(air), *steps[end:]]
    return ComposeTransforms([FillPadding(intensity), *steps])
