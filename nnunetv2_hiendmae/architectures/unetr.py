"""The segmentation network: tapped encoder layers through a UNETR-style decoder (paper, section on downstream tasks).

Shapes: B batch, C channels, K classes, E embed_dim, L tokens, ``g`` the token grid, ``f`` feature_size.
"""

from __future__ import annotations

from functools import partial
from math import log
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.architectures.segmentation import SegmentationNetwork
from nnunetv2_hiendmae.checks import Size

ResBlock = partial(
    BasicBlockD,
    nn.Conv3d,
    kernel_size=3,
    stride=1,
    norm_op=nn.InstanceNorm3d,
    nonlin=nn.LeakyReLU,
    nonlin_kwargs={"inplace": True},
)

RARE = 0.02
"""Odds of an organ at a voxel before anything is learned."""


class TapPath(nn.Module):
    """Bring one tapped layer to its decoder resolution: a transposed convolution, then (transposed, residual) pairs."""

    def __init__(self, embed_dim: int, features: int, strides: list[Size]) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(embed_dim, features, strides[0], strides[0], bias=False)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose3d(features, features, stride, stride, bias=False),
                    ResBlock(input_channels=features, output_channels=features),
                )
                for stride in strides[1:]
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.up(x))


class UpBlock(nn.Module):
    """Double the resolution, join the skip of that resolution, and mix both."""

    def __init__(self, in_features: int, features: int, stride: Size) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_features, features, stride, stride, bias=False)
        self.mix = ResBlock(input_channels=2 * features, output_channels=features)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.mix(torch.cat([self.up(x), skip], dim=1))


class SegHead(nn.Module):
    """Logits of one output. ``-pretrained_weights`` skips what nnU-Net's networks call ``….seg_layers.…``."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList([nn.Conv3d(features, num_classes, 1)])

    @torch.no_grad()
    def expect_few(self, *, has_background: bool) -> None:
        """Let the odds of every organ start at ``RARE`` (as RetinaNet's: Lin et al. 2017, section 4.1).

        From even odds the first steps of AdamW only unlearn organs where there are none, and go so far that small ones
        may not come back for hundreds of steps.

        Args:
            has_background: channel 0 is the background, in one softmax with the others; else each has a sigmoid.
        """
        bias = self.seg_layers[0].get_parameter("bias")
        nn.init.constant_(bias, log(RARE))
        if has_background:
            bias[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.seg_layers[0](x)


class HiEndMAEUNETR(SegmentationNetwork):
    """Hierarchical decoder on the tapped layers of an encoder.

    The deepest, final-normed tokens are brought up step by step; before each step's mixing the next tapped layer
    joins as a skip, deep to shallow, and at full resolution a residual block on the image itself. The encoder sees
    canonical intensities (``intensity``); the full-resolution block sees the image as nnU-Net normalised it, which
    loses nothing to the window.

    Args:
        encoder, shared: see ``SegmentationNetwork``.
        input_channels: image channels C.
        num_classes: output channels K.
        feature_size: channels ``f`` at full resolution; level k of the decoder has ``f·2^k``.
    """

    def __init__(
        self, encoder: EncoderConfig, *, input_channels: int, num_classes: int, feature_size: int = 32, **shared: Any
    ) -> None:
        super().__init__(encoder, input_channels=input_channels, num_classes=num_classes, **shared)
        patch, width, n = encoder.patch_size, encoder.embed_dim, len(encoder.taps)
        # Up-sampling steps from the token grid, deep to shallow: 2 while that stays below full resolution, where only
        # the thin last block works (published patches of 12 and 16: 2, 2, 2).
        steps: list[Size] = [tuple(2 if 2 ** (k + 1) < p else 1 for p in patch) for k in range(n)]  # type: ignore[misc]
        features = [feature_size * 2 ** (n - k) for k in range(n)]  # after step k; [8f, 4f, 2f] for three taps

        self.image_path = ResBlock(input_channels=input_channels, output_channels=feature_size)
        # Index k counts decoder steps: k = 0 joins the deepest tap after one step, the last the shallowest.
        self.tap_paths = nn.ModuleList(TapPath(width, features[k], steps[: k + 1]) for k in range(n))
        self.up_blocks = nn.ModuleList(
            UpBlock(width if k == 0 else features[k - 1], features[k], steps[k]) for k in range(n)
        )
        self.reduce = nn.Conv3d(features[-1], feature_size, 3, padding=1)
        self.mix = ResBlock(input_channels=2 * feature_size, output_channels=feature_size)
        self.head = SegHead(feature_size, num_classes)

    def decode(self, x: Tensor, taps: list[Tensor], final: Tensor) -> Tensor:
        y = final
        for path, up, tap in zip(self.tap_paths, self.up_blocks, reversed(taps), strict=True):
            y = up(y, path(tap))
        # The rest of the way (12 = 2·2·2·1.5) is interpolated, then the padding is cut off.
        whole = [g * p for g, p in zip(final.shape[2:], self.vit.config.patch_size, strict=True)]
        y = F.interpolate(y, size=whole, mode="trilinear")
        y = self.reduce(y)[:, :, : x.shape[2], : x.shape[3], : x.shape[4]]
        return self.head(self.mix(torch.cat([y, self.image_path(x)], dim=1)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Checkpoints of version 0.1 call the head's layer ``seg_head``."""
        for name in ("weight", "bias"):
            if f"{prefix}seg_head.{name}" in state_dict:
                state_dict[f"{prefix}head.seg_layers.0.{name}"] = state_dict.pop(f"{prefix}seg_head.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)
