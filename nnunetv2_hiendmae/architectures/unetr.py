"""The segmentation network: tapped ViT layers through a UNETR-style decoder (paper, section on downstream tasks).

Shapes: B batch, C channels, K classes, E embed_dim, L tokens, ``g`` the token grid, ``f`` feature_size.
"""

from __future__ import annotations

from functools import partial

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.vit import ViT, ViTConfig
from nnunetv2_hiendmae.intensity import CanonicalIntensity

Size = tuple[int, int, int]

ResBlock = partial(
    BasicBlockD,
    nn.Conv3d,
    kernel_size=3,
    stride=1,
    norm_op=nn.InstanceNorm3d,
    nonlin=nn.LeakyReLU,
    nonlin_kwargs={"inplace": True},
)


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


class HiEndMAEUNETR(nn.Module):
    """Hierarchical decoder on the tapped layers of a ViT.

    The deepest, final-normed tokens are brought up step by step; before each step's mixing the next tapped layer
    joins as a skip, deep to shallow, and at full resolution a residual block on the image itself. The ViT sees
    canonical intensities (``intensity``); the full-resolution block sees the image as nnU-Net normalised it, which
    loses nothing to the window.

    Args:
        encoder: ViT architecture; its ``in_channels`` is replaced by ``input_channels``.
        input_channels: image channels C.
        num_classes: output channels K.
        img_size: usual input size ``(H, W, D)``; any other works too.
        feature_size: channels ``f`` at full resolution; level k of the decoder has ``f·2^k``.
        intensity: map from the input's intensities to the canonical ones; None takes the input as canonical.
        learned_pos_embed: train the position embedding, which starts as sine-cosine (published: yes).
        drop_path: stochastic-depth rate of the ViT's last block.
        identity_blocks: control; the ViT's blocks pass their input on and have no parameters.
    """

    def __init__(
        self,
        encoder: ViTConfig,
        *,
        input_channels: int,
        num_classes: int,
        img_size: Size,
        feature_size: int = 32,
        intensity: CanonicalIntensity | None = None,
        learned_pos_embed: bool = True,
        drop_path: float = 0.0,
        identity_blocks: bool = False,
    ) -> None:
        super().__init__()
        config = ViTConfig(**{**encoder.to_dict(), "in_channels": input_channels})
        patch, n = config.patch_size, len(config.taps)
        grid = tuple(-(-s // p) for s, p in zip(img_size, patch, strict=True))
        # Up-sampling steps from the token grid, deep to shallow: 2 while that stays below full resolution, where only
        # the thin last block works (published patches of 12 and 16: 2, 2, 2).
        steps: list[Size] = [tuple(2 if 2 ** (k + 1) < p else 1 for p in patch) for k in range(n)]  # type: ignore[misc]
        features = [feature_size * 2 ** (n - k) for k in range(n)]  # after step k; [8f, 4f, 2f] for three taps

        self.intensity = intensity or CanonicalIntensity.identity(input_channels)
        self.vit = ViT(config, grid, class_token=False, learned_pos_embed=learned_pos_embed, drop_path=drop_path)  # type: ignore[arg-type]
        if identity_blocks:
            self.vit.blocks = nn.ModuleList(nn.Identity() for _ in range(config.depth))
        self.image_path = ResBlock(input_channels=input_channels, output_channels=feature_size)
        # Index k counts decoder steps: k = 0 joins the deepest tap after one step, the last the shallowest.
        self.tap_paths = nn.ModuleList(TapPath(config.embed_dim, features[k], steps[: k + 1]) for k in range(n))
        self.up_blocks = nn.ModuleList(
            UpBlock(config.embed_dim if k == 0 else features[k - 1], features[k], steps[k]) for k in range(n)
        )
        self.reduce = nn.Conv3d(features[-1], feature_size, 3, padding=1)
        self.mix = ResBlock(input_channels=2 * feature_size, output_channels=feature_size)
        self.seg_head = nn.Conv3d(feature_size, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Image ``(B, C, H, W, D)`` of any size to logits ``(B, K, H, W, D)``."""
        size = x.shape[2:]
        tokens_in, grid = self.pad_to_patches(self.intensity(x))
        taps, final = self.vit(tokens_in)

        y = to_volume(final, grid)
        for path, up, tap in zip(self.tap_paths, self.up_blocks, reversed(taps), strict=True):
            y = up(y, path(to_volume(tap, grid)))
        # The rest of the way (12 = 2·2·2·1.5) is interpolated, then the padding is cut off.
        y = F.interpolate(y, size=tokens_in.shape[2:], mode="trilinear")
        y = self.reduce(y)[:, :, : size[0], : size[1], : size[2]]
        return self.seg_head(self.mix(torch.cat([y, self.image_path(x)], dim=1)))

    def pad_to_patches(self, x: Tensor) -> tuple[Tensor, Size]:
        """Pad ``(B, C, H, W, D)`` with 0 (air) at the far ends to whole patches; returns it and the token grid."""
        h, w, d = (-(-s // p) for s, p in zip(x.shape[2:], self.vit.config.patch_size, strict=True))
        whole = [g * p for g, p in zip((h, w, d), self.vit.config.patch_size, strict=True)]
        missing = [w - s for w, s in zip(whole, x.shape[2:], strict=True)]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        return x, (h, w, d)


def to_volume(tokens: Tensor, grid: Size) -> Tensor:
    """Tokens ``(B, L, E)`` to a feature volume ``(B, E, gh, gw, gd)``."""
    return tokens.transpose(1, 2).unflatten(2, grid)
