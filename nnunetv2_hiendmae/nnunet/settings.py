"""What a user may set for fine-tuning: the ``hiendmae`` block of a plans configuration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.architectures.kinds import ENCODERS, encoder_config
from nnunetv2_hiendmae.architectures.segmentation import check_patch_decoder
from nnunetv2_hiendmae.checks import MAX_COUNT, Size
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, Window, check_window

BLOCK = "hiendmae"
"""Key of the block in a plans configuration."""

NETWORK = ("architecture", "window_hu", "segmentation_decoder", "feature_size", "identity_blocks")
"""The settings that make the network what it is: a checkpoint fits only if they agree."""

SEGMENTATION_DECODERS = ("hierarchical", "patch")

BUDGET = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "no_mirroring",
          "no_augmentation")  # fmt: skip
"""The settings that every arm of a benchmark shares, nnU-Net's own trainers too."""


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """One ``hiendmae`` block. The trainer fills what was left open and saves the whole in the results' plans.json."""

    weights: str | None = None
    """Weights file to start from; None: found as the README says."""
    weights_sha256: str | None = None
    """Refuse weights with another sha256; written by the trainer."""
    architecture: str | dict[str, Any] | None = None
    """Encoder preset, or kind and fields of its architecture; None: that of the weights (without weights: ``tiny``)."""
    vit_patch_size: Size | None = None
    """Voxels of a token; None: as the weights have it. The patch embedding is resized by the pseudo-inverse rule."""
    window_hu: Window | None = None
    """Canonical HU window; None: that of the weights (without weights: -175…250)."""
    segmentation_decoder: str = "hierarchical"
    """``hierarchical``: the tapped layers step by step to full resolution (published); ``patch``: Primus' own, on the
    final tokens alone."""
    feature_size: int = 32
    """Channels of the hierarchical decoder at full resolution; published: 32."""
    drop_path: float = 0.0
    """Stochastic-depth rate of the last encoder block."""
    num_epochs: int = 1000
    """Epochs; nnU-Net's default."""
    num_iterations_per_epoch: int = 250
    """Training iterations an epoch; nnU-Net's default."""
    num_val_iterations_per_epoch: int = 50
    """Validation iterations an epoch; nnU-Net's default."""
    no_mirroring: bool = False
    """No flips in training, none averaged in prediction: for left and right organs that look alike, as in nnU-Net's
    ``nnUNetTrainerNoMirroring``."""
    no_augmentation: bool = False
    """Training patches as they were cropped, nothing mirrored either, as in nnU-Net's ``nnUNetTrainerNoDA``: for
    budgets too short to gain from augmentation."""
    initial_lr: float = 1e-4
    """Peak learning rate of AdamW; published: 1e-4."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and kernels; none on norms, biases and position embeddings."""
    layer_decay: float = 1.0
    """Learning rate of an encoder layer over that of the next deeper one; published: 1."""
    warmup_epochs: int = 50
    """Linear warm-up from 1/warmup_epochs of the peak; published: 50. At most a tenth of ``num_epochs`` is used."""
    frozen_epochs: int = 0
    """Epochs at the start in which the encoder does not learn and has no stochastic depth, and its gradients are
    not computed; ``num_epochs`` or more: a probe of the frozen encoder."""
    identity_blocks: bool = False
    """Control: the encoder's blocks do nothing and have no parameters; only its embedding and final norm are left."""

    def __post_init__(self) -> None:
        if self.window_hu is not None:
            object.__setattr__(self, "window_hu", tuple(self.window_hu))
            check_window(self.window_hu)
        if self.vit_patch_size is not None:
            object.__setattr__(self, "vit_patch_size", tuple(self.vit_patch_size))
            if len(self.vit_patch_size) != 3 or not all(type(n) is int and 0 < n <= 64 for n in self.vit_patch_size):
                raise ValueError(f"vit_patch_size={self.vit_patch_size} must be three integers of 1 to 64.")
        for name, low in (("feature_size", 1), ("num_epochs", 1), ("num_iterations_per_epoch", 1),
                          ("num_val_iterations_per_epoch", 1), ("warmup_epochs", 0), ("frozen_epochs", 0)):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= MAX_COUNT:
                raise ValueError(f"{name}={value!r} must be an integer of at least {low} and at most {MAX_COUNT}.")
        if not 0 < self.initial_lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"initial_lr={self.initial_lr} must be > 0, weight_decay={self.weight_decay} >= 0.")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.drop_path < 1:
            raise ValueError(f"layer_decay={self.layer_decay} must be in (0, 1], drop_path={self.drop_path} in [0, 1).")
        for name in ("identity_blocks", "no_mirroring", "no_augmentation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
        if self.segmentation_decoder not in SEGMENTATION_DECODERS:
            known = ", ".join(SEGMENTATION_DECODERS)
            raise ValueError(f"Unknown segmentation_decoder='{self.segmentation_decoder}'; known: {known}.")
        if self.encoder is not None and self.segmentation_decoder == "patch":
            check_patch_decoder(self.encoder)

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> FineTuneSettings:
        """Read the block of an inheritance-resolved plans configuration; defaults where there is none.

        Raises:
            ValueError: unknown key or impossible value; names it.
        """
        block = configuration.get(BLOCK, {})
        if not isinstance(block, dict):
            raise ValueError(f"The plans' '{BLOCK}' block must be an object, not {block!r}.")
        known = {f.name for f in fields(cls)}
        if set(block) - known:
            raise ValueError(
                f"Unknown keys {sorted(set(block) - known)} in the plans' '{BLOCK}' block; known: {sorted(known)}."
            )
        try:
            settings = cls(**block)
            _ = settings.encoder
        except TypeError as error:  # of another type than the setting's
            raise ValueError(f"The plans' '{BLOCK}' block: {error}.") from None
        if settings.weights is not None and not isinstance(settings.weights, str):
            raise ValueError(f"The plans' '{BLOCK}' block: weights={settings.weights!r} must be a file's name.")
        return settings

    @property
    def encoder(self) -> EncoderConfig | None:
        """The encoder's architecture, None if it is the weights' business."""
        if self.architecture is None or isinstance(self.architecture, dict):
            return self.architecture and encoder_config(self.architecture)  # type: ignore[return-value]
        if self.architecture not in ENCODERS:
            raise ValueError(f"Unknown architecture '{self.architecture}'; presets: {', '.join(ENCODERS)}.")
        return ENCODERS[self.architecture]

    def resolved(self, encoder: EncoderConfig, window: Window, **changes: Any) -> FineTuneSettings:
        """With architecture and window filled in.

        Raises:
            ValueError: the block asks for another architecture or window.
        """
        # The channels a file was trained on are not an architecture choice: its stem is spread over the plan's.
        fitting = {"in_channels": encoder.in_channels}
        if self.vit_patch_size is not None:  # nor are the tokens, where others are asked for: its stem is resized
            encoder = replace(encoder, patch_size=self.vit_patch_size)
            fitting["patch_size"] = self.vit_patch_size  # type: ignore[assignment]
        if self.encoder is not None and replace(self.encoder, **fitting) != encoder:  # type: ignore[arg-type]
            raise ValueError(
                f"The plans ask for the architecture {self.architecture}, the weights have {encoder.to_dict()}. "
                f"Leave 'architecture' out of the plans, or name other weights."
            )
        if self.window_hu is not None and tuple(self.window_hu) != tuple(window):
            raise ValueError(
                f"The plans ask for the HU window {self.window_hu}, the weights were trained on {window}. "
                f"Leave 'window_hu' out of the plans, or name other weights."
            )
        return replace(self, architecture=encoder.to_dict(), window_hu=window, **changes)

    def resolved_scratch(self) -> FineTuneSettings:
        """With the default architecture and window where none is given."""
        encoder = self.encoder or ENCODERS["tiny"]
        return self.resolved(encoder, self.window_hu or DEFAULT_WINDOW, weights=None, weights_sha256=None)

    def to_block(self) -> dict[str, Any]:
        """Plain data for the plans."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def same_network(self, other: FineTuneSettings) -> bool:
        """Whether both describe the same network, so that one's checkpoint fits the other."""
        networks = [{name: getattr(s, name) for name in NETWORK} | {"architecture": s.encoder} for s in (self, other)]
        return networks[0] == networks[1]
