"""A patch embedding for another token size (FlexiViT, arXiv 2212.08013, section 3.4, in three axes)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.checks import Size


def enlarging(old: int, new: int) -> Tensor:
    """Matrix ``(new, old)`` of linear interpolation from ``old`` to ``new`` voxels along an axis."""
    return F.interpolate(torch.eye(old, dtype=torch.float64)[None], size=new, mode="linear")[0].T


def resize_patch_embed(weight: Tensor, patch: Size) -> tuple[Tensor, float]:
    """Weight ``(E, C, ph, pw, pd)`` of the embedding for patches of another size, by the pseudo-inverse rule.

    The new weight gives a resampled patch the token that the old weight gave the patch itself: exactly where patches
    grow, as nearly as can be (least squares) where they shrink.

    Returns:
        The weight, and the share of the old one's norm that it cannot express: 0 where patches grow.
    """
    new = weight.double()
    for axis, (p, q) in enumerate(zip(weight.shape[2:], patch, strict=True), start=2):
        matrix = enlarging(p, q).to(weight.device)
        new = (new.movedim(axis, -1) @ torch.linalg.pinv(matrix)).movedim(-1, axis)
    back = new
    for axis, (p, q) in enumerate(zip(weight.shape[2:], patch, strict=True), start=2):
        back = (back.movedim(axis, -1) @ enlarging(p, q).to(weight.device)).movedim(-1, axis)
    lost = float((back - weight.double()).norm() / weight.double().norm())
    return new.to(weight.dtype), lost
