"""What every kind of encoder has in common: its architecture as plain data, and what is asked of its network.

Shapes: B batch, C channels, L tokens of the whole grid, N tokens given, E embed_dim, P = ph·pw·pd·C.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.checks import Size

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_TOKENS = 50_000
"""Of a crop (36³; published: 8³ at most): more is a slip, or a header that is not honest."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture of an encoder, as it travels in weights headers and plans; a subclass is a kind.

    A kind adds its own fields and checks, says how its network is built, and names what others ask for by name.
    """

    stem: ClassVar[str]
    """The convolution that makes tokens of patches, in the names of the kind's network."""
    trunk: ClassVar[str]
    """Prefix of ``blocks.<i>.…`` and ``norm.…``."""
    positions: ClassVar[str]
    """Position embedding, ``(1, tokens without a place in the grid + L, E)`` where it is a parameter."""
    pretraining_only: ClassVar[tuple[str, ...]] = ()
    """Tensors that segmentation does not use."""
    exported_in: ClassVar[str]
    """Prefix of the encoder's tensors in the network that ``exported_class`` names."""

    kind: str = ""
    """Name of the kind."""
    patch_size: tuple[int, int, int]
    """Edge lengths of a token in voxels, per axis."""
    embed_dim: int
    """Token width E."""
    depth: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads per block."""
    in_channels: int = 1
    """Image channels."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over ``embed_dim``."""
    taps: tuple[int, ...] = (3, 6, 9)
    """0-based indices of the blocks whose outputs feed the decoders, shallow to deep."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "taps", tuple(self.taps))
        if self.kind != type(self).kind:
            raise ValueError(f"kind={self.kind!r} is not that of {type(self).__name__}, '{type(self).kind}'.")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size={self.patch_size} must be three positive integers.")
        counts = {name: getattr(self, name) for name in ("embed_dim", "depth", "num_heads", "in_channels")}
        if not all(type(n) is int and n > 0 for n in (*self.patch_size, *counts.values())) or not self.mlp_ratio > 0:
            raise ValueError(f"{counts}, mlp_ratio={self.mlp_ratio}: all must be positive, the counts integers.")
        self.check_width()
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or not 0 <= self.taps[0] <= self.taps[-1]:
            raise ValueError(f"taps={self.taps} must be distinct block indices in ascending order.")
        if self.taps[-1] >= self.depth:
            raise ValueError(f"taps={self.taps} name blocks beyond depth={self.depth} (indices are 0-based).")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``; ``ValueError`` names unknown keys."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"Unknown architecture keys {sorted(unknown)}; known: {[f.name for f in fields(cls)]}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON and ``torch.load(weights_only=True)`` safe)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def names() -> list[str]:
        """The fields that every kind has."""
        return [f.name for f in fields(EncoderConfig)]

    def common(self) -> dict[str, Any]:
        """The values of the fields that every kind has."""
        return {name: getattr(self, name) for name in self.names()}

    def options(self) -> dict[str, Any]:
        """The fields that only this kind has."""
        return {k: v for k, v in self.to_dict().items() if k not in self.names()}

    def layer_of(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embedding, i + 1 block i, ``depth + 1`` final norm."""
        module = name.removeprefix(self.trunk).split(".")
        if module[0] == "blocks":
            return int(module[1]) + 1
        return self.depth + 1 if module[0] == "norm" else 0

    @classmethod
    @abstractmethod
    def presets(cls) -> dict[str, EncoderConfig]:
        """Named architectures, for ``-preset`` and ``--architecture``."""

    @abstractmethod
    def check_width(self) -> None:
        """``ValueError`` unless ``embed_dim`` suits the kind's heads and positions."""

    @abstractmethod
    def build(self, grid: Size, *, pretraining: bool, drop_path: float = 0.0) -> Encoder:
        """A network with fresh weights for a token grid.

        Args:
            grid: of the usual input.
            pretraining: with what only pre-training has (``pretraining_only``).
            drop_path: stochastic-depth rate of the last block, rising linearly from 0 at the first.
        """

    @abstractmethod
    def exported_class(self) -> tuple[str, dict[str, Any] | None]:
        """Segmentation network that files in nnssl's format are for: its name, and arguments that the name lacks."""

    @abstractmethod
    def build_like(self, state: Mapping[str, Tensor], grid: Size) -> Encoder:
        """A network with the tensors that ``state`` names, where the kind leaves a choice."""


class Encoder(nn.Module):
    """A network that turns patches into tokens and runs transformer blocks on them."""

    config: EncoderConfig
    grid: Size
    """Token grid ``(gh, gw, gd)`` of the usual input; ``positions_for`` makes others work."""
    blocks: nn.ModuleList
    norm: nn.Module
    num_prefix: int = 0
    """Tokens without a patch that come first in what ``encode`` returns."""

    @property
    def stem(self) -> nn.Conv3d:
        """The strided convolution that embeds patches."""
        return self.get_submodule(self.config.stem)  # type: ignore[return-value]

    def project(self, patches: Tensor) -> Tensor:
        """Flat patches ``(B, N, P)`` ordered ``(ph, pw, pd, c)`` to tokens ``(B, N, E)``; for a subset of the grid."""
        weight = self.stem.weight  # (E, C, ph, pw, pd), to (E, P)
        # With one channel there is nothing to permute, and the gradient keeps the layout that DDP's buckets have.
        weight = weight.flatten(1) if weight.shape[1] == 1 else weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(patches, weight, self.stem.bias)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Volume ``(B, C, H, W, D)``, sizes divisible by the patch; returns what ``encode`` does for all L tokens."""
        p = self.config.patch_size
        grid = (x.shape[2] // p[0], x.shape[3] // p[1], x.shape[4] // p[2])
        return self.encode(self.stem(x).flatten(2).transpose(1, 2), *self.positions_for(grid))

    @abstractmethod
    def positions_for(self, grid: Size) -> tuple[Tensor, ...]:
        """What the kind knows of each place of a grid, ``(1, L, …)`` each. Masking takes the visible rows."""

    @abstractmethod
    def encode(self, tokens: Tensor, *positions: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the blocks on embedded tokens ``(B, N, E)`` at places ``(B or 1, N, …)``.

        Returns:
            Outputs of the tapped blocks, shallow to deep, *before* the final norm, and the final-normed output;
            each ``(B, num_prefix + N, E)``.
        """


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same network with random weights, as pre-training starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = encoder.config.build_like(encoder.state_dict(), encoder.grid)
    return fresh.to(encoder.stem.weight.device).eval().requires_grad_(False)
