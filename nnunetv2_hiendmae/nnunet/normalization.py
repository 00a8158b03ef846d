"""nnU-Net normalisation scheme whose output is the canonical intensity domain."""

from __future__ import annotations

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization


class HUWindowNormalization(ImageNormalization):
    """Clip HU to ``[window_lower, window_upper]`` of the plans' intensity properties and scale to [0, 1]."""

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = False

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        low, high = self.intensityproperties["window_lower"], self.intensityproperties["window_upper"]
        image = image.astype(self.target_dtype, copy=False)
        np.clip(image, low, high, out=image)
        image -= low
        image /= high - low
        return image
