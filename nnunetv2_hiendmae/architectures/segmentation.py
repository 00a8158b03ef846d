"""What segmentation networks share, whatever their encoder and decoder, and the one with Primus' own decoder.

Shapes: B batch, C channels, K classes, E embed_dim, L tokens, ``g`` the token grid.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.intensity import CanonicalIntensity


class NoBlock(nn.Module):
    """A transformer block that does nothing."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


class SegmentationNetwork(nn.Module):
    """An encoder that sees canonical intensities, whole patches and air around the image, and a decoder.

    Args:
        encoder: architecture; its ``in_channels`` is replaced by ``input_channels``.
        input_channels: image channels C.
        num_classes: output channels K.
        img_size: usual input size ``(H, W, D)``; any other works too.
        intensity: map from the input's intensities to the canonical ones; None takes the input as canonical.
        drop_path: stochastic-depth rate of the encoder's last block.
        identity_blocks: control; the encoder's blocks pass their input on and have no parameters.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        *,
        input_channels: int,
        num_classes: int,
        img_size: Size,
        intensity: CanonicalIntensity | None = None,
        drop_path: float = 0.0,
        identity_blocks: bool = False,
    ) -> None:
        super().__init__()
        config = type(encoder).from_dict({**encoder.to_dict(), "in_channels": input_channels})
        h, w, d = (-(-s // p) for s, p in zip(img_size, config.patch_size, strict=True))
        self.intensity = intensity or CanonicalIntensity.identity(input_channels)
        # A vision transformer of any kind; its name is that of the first kind, which checkpoints have.
        self.vit = config.build((h, w, d), pretraining=False, drop_path=drop_path)
        if identity_blocks:
            for i in range(config.depth):
                self.vit.blocks[i] = NoBlock()

    def forward(self, x: Tensor) -> Tensor:
        """Image ``(B, C, H, W, D)`` of any size to logits ``(B, K, H, W, D)``."""
        x = self.intensity.fill_padding(x)
        tokens_in, grid = self.pad_to_patches(self.intensity(x))
        taps, final = self.vit(tokens_in)
        return self.decode(x, [to_volume(tap, grid) for tap in taps], to_volume(final, grid))

    @abstractmethod
    def decode(self, x: Tensor, taps: list[Tensor], final: Tensor) -> Tensor:
        """The image, and the tapped layers, shallow to deep, and final tokens as ``(B, E, gh, gw, gd)``, to logits."""

    def pad_to_patches(self, x: Tensor) -> tuple[Tensor, Size]:
        """Pad ``(B, C, H, W, D)`` with air at the far ends to whole patches; returns it and the token grid."""
        h, w, d = (-(-s // p) for s, p in zip(x.shape[2:], self.vit.config.patch_size, strict=True))
        whole = [g * p for g, p in zip((h, w, d), self.vit.config.patch_size, strict=True)]
        missing = [w - s for w, s in zip(whole, x.shape[2:], strict=True)]
        if any(missing):
            air = self.intensity.air
            x = F.pad(x - air, (0, missing[2], 0, missing[1], 0, missing[0])) + air
        return x, (h, w, d)


class PatchSegmenter(SegmentationNetwork):
    """Primus' own decoder on the final tokens: transposed convolutions, each doubling the resolution."""

    def __init__(self, encoder: EncoderConfig, *, input_channels: int, num_classes: int, **shared: Any) -> None:
        check_patch_decoder(encoder)
        super().__init__(encoder, input_channels=input_channels, num_classes=num_classes, **shared)
        from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode
        from dynamic_network_architectures.initialization.weight_init import InitWeights_He

        self.up_projection = PatchDecode(encoder.patch_size, encoder.embed_dim, num_classes)
        self.up_projection.apply(InitWeights_He(1e-2))

    def decode(self, x: Tensor, taps: list[Tensor], final: Tensor) -> Tensor:
        return self.up_projection(final)[:, :, : x.shape[2], : x.shape[3], : x.shape[4]]


def check_patch_decoder(encoder: EncoderConfig) -> None:
    """``ValueError`` unless doubling steps lead from a token to its voxels."""
    if max(encoder.patch_size) < 2 or any(p & (p - 1) for p in encoder.patch_size):
        raise ValueError(
            f"Primus' patch decoder needs tokens whose edges are powers of two; these are {encoder.patch_size}. "
            f"Choose the hierarchical decoder."
        )


def to_volume(tokens: Tensor, grid: Size) -> Tensor:
    """Tokens ``(B, L, E)`` to a feature volume ``(B, E, gh, gw, gd)``."""
    return tokens.transpose(1, 2).unflatten(2, grid)
