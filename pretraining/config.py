"""All numbers of pre-training: the model's, the run's, and the presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from nnunetv2_hiendmae.architectures.encoder import MAX_TOKENS, EncoderConfig
from nnunetv2_hiendmae.architectures.kinds import ENCODERS, encoder_config
from nnunetv2_hiendmae.checks import Size, check_count
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, Window, check_window
from pretraining.masking import num_visible

PRECISIONS = ("fp32", "bf16", "fp16")
WEIGHT_INITS = ("published", "small")
DECODERS = ("hierarchical", "last_layer", "self_attention")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of Hi-End-MAE for one crop size."""

    img_size: Size
    """Crop ``(H, W, D)`` in voxels; divisible by ``patch_size``."""
    patch_size: Size
    """Token ``(ph, pw, pd)`` in voxels."""
    in_channels: int
    """Image channels."""
    embed_dim: int
    """Encoder width E; divisible by 6 and by ``num_heads`` (``primus``: by 6 · ``num_heads``)."""
    depth: int
    """Encoder blocks."""
    num_heads: int
    """Encoder attention heads."""
    mlp_ratio: float
    """MLP hidden width over width, encoder and decoder."""
    taps: tuple[int, ...]
    """0-based encoder blocks the decoder queries, shallow to deep; published: (3, 6, 9)."""
    mask_ratio: float
    """Share of tokens to rebuild; published: 0.75."""
    decoder_embed_dim: int
    """Decoder width D; divisible by 6 and by ``decoder_num_heads``."""
    decoder_num_heads: int
    """Decoder attention heads."""
    decoder_self_depth: int
    """Self-attention blocks before the cross-attention blocks; published: 2."""
    decoder: str = "hierarchical"
    """``hierarchical``: each cross-attention block queries its tap (published). Controls that take the method's two
    ideas away one by one: ``last_layer``: all query the encoder's final output; ``self_attention``: none queries,
    ``len(taps)`` further self-attention blocks take their place (a plain MAE)."""
    kind: str = "vit"
    """Kind of encoder: ``vit`` (published) or ``primus`` (nnU-Net's)."""
    encoder_options: dict[str, Any] = field(default_factory=dict)
    """Fields of the kind's architecture that the others do not have."""

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "taps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _ = self.encoder  # validates the encoder's part
        if len(self.img_size) != 3 or any(s < p or s % p for s, p in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size={self.img_size} must be a multiple of patch_size={self.patch_size} per axis.")
        if self.decoder_embed_dim % 6 or self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(
                f"decoder_embed_dim={self.decoder_embed_dim} must be divisible by 6 and by "
                f"decoder_num_heads={self.decoder_num_heads}."
            )
        if self.decoder not in DECODERS:
            raise ValueError(f"Unknown decoder='{self.decoder}'; known: {', '.join(DECODERS)}.")
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(f"img_size={self.img_size} makes {self.num_tokens} tokens, more than {MAX_TOKENS}.")
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must be a share of the tokens.")
        if not 0 < self.num_visible < self.num_tokens:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} leaves {self.num_visible} of {self.num_tokens} tokens visible; "
                f"at least one must be visible and one masked."
            )

    @property
    def encoder(self) -> EncoderConfig:
        """The part that fine-tuning keeps."""
        return encoder_config({**self.encoder_options, **{name: getattr(self, name) for name in EncoderConfig.names()}})

    @cached_property
    def grid(self) -> Size:
        """Tokens per axis."""
        h, w, d = (s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        return h, w, d

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_visible(self) -> int:
        """V."""
        return num_visible(self.num_tokens, self.mask_ratio)

    @property
    def num_masked(self) -> int:
        """M."""
        return self.num_tokens - self.num_visible

    @property
    def patch_dim(self) -> int:
        """P, voxels of a token over all channels."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2] * self.in_channels


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One pre-training run. Two runs with equal configs on one device type see the same numbers in the same order."""

    datasets: tuple[str, ...]
    """nnU-Net data set names."""
    plans: str
    """Plans name, e.g. nnUNetPlans."""
    configuration: str
    """Configuration of the plans, e.g. 3d_fullres."""
    model: ModelConfig
    """Architecture."""
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Crops a step, over all GPUs and accumulated micro-batches."""
    packed_bits: int = 0
    """Bits a voxel of a packed corpus (8 or 16); 0: nnU-Net's .b2nd files."""
    window_hu: Window = DEFAULT_WINDOW
    """HU range scaled to [0, 1]."""
    init: str | None = None
    """Run folder, checkpoint or weights file to start from; None: random weights."""
    crops_per_case: int = 1
    """Consecutive crops taken from one case before the next; published: 8."""
    body_fraction: float = 0.75
    """Share of crops centred on tissue, the others anywhere; published: 6 of 8."""
    base_lr: float = 1e-4
    """Peak learning rate; published: 1e-4."""
    warmup_steps: float = 0.0
    """Steps of linear warm-up; published: 10 of 1000 epochs, 1 % of the steps."""
    weight_init: str = "published"
    """``small``: residual branches and predicted voxels start smaller than published (``pretraining/recipe.py``)."""
    recipe: str = ""
    """Why rate, warm-up and initialisation are what they are, where the user left them open."""
    weight_decay: float = 0.05
    """Decoupled weight decay; published: 0.05."""
    decay_all: bool = False
    """Decay norms, biases and tokens too, as the published code does."""
    grad_clip: float = 0.0
    """Norm that gradients are clipped to; 0 (published): not clipped."""
    precision: str = "fp32"
    """Of matrix products: fp32, bf16, or fp16 with loss scaling (published)."""
    augment: bool = True
    """Flips, axial 90-degree rotations, intensity scale and shift."""
    val_every: int = 100
    """Steps between held-out reconstruction losses."""
    log_every: int = 10
    """Steps that a line of metrics.jsonl averages."""
    preview_epochs: int = 10
    """Passes over the cases between pictures of held-out reconstructions; 0: none."""
    probe: str | None = None
    """Labelled nnU-Net data set that the encoder's tokens are probed on; None: no probe."""
    probe_plans: str | None = None
    """Its plans; None: those of the run, or the default ones on packed data."""
    probe_every: int = 500
    """Steps between probes; there is one before the first step and one after the last."""
    seed: int = 41
    """Of weights, case order, crops, augmentation and masks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "datasets", tuple(self.datasets))
        object.__setattr__(self, "window_hu", tuple(self.window_hu))
        for name in ("steps", "batch_size", "crops_per_case", "val_every", "log_every", "probe_every"):
            check_count(name, getattr(self, name))
        for name in ("preview_epochs", "seed"):
            check_count(name, getattr(self, name), 0)
        if not 0 <= self.grad_clip < math.inf:
            raise ValueError(f"grad_clip={self.grad_clip} must be a number of at least 0.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"Unknown precision='{self.precision}'; known: {', '.join(PRECISIONS)}.")
        check_window(self.window_hu)
        if not 0 < self.base_lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"base_lr={self.base_lr} must be > 0, weight_decay={self.weight_decay} >= 0.")
        if not 0 <= self.body_fraction <= 1:
            raise ValueError(f"body_fraction={self.body_fraction} must be a share of the crops.")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps:g} must be at least 0 and below steps={self.steps}.")
        if self.weight_init not in WEIGHT_INITS:
            raise ValueError(f"Unknown weight_init='{self.weight_init}'; known: {', '.join(WEIGHT_INITS)}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON and ``torch.load(weights_only=True)`` safe)."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Inverse of ``to_dict``; also of what earlier versions wrote."""
        if "warmup_fraction" in values:
            values = {**values, "warmup_steps": values["warmup_fraction"] * values["steps"]}
            del values["warmup_fraction"]
        return cls(**{**values, "model": ModelConfig(**values["model"])})


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a run is computed. It changes results by rounding only, so a run may be continued with another."""

    device: str
    """cuda, cpu or mps."""
    num_workers: int = 0
    """Loader processes of each rank."""
    accumulate: int = 1
    """Micro-batches a step, one after the other: less memory."""
    activation_checkpointing: bool = False
    """Keep block inputs only and compute the rest again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the model."""
    checkpoint_minutes: float = 10.0
    """Between checkpoints, which are written while training goes on; 0: as soon as the last one is written."""
    keep_checkpoints: int = 2
    """Latest checkpoints on disk."""
    stop_on_plateau: bool = False
    """End a run that does not learn, with exit code 3."""

    def __post_init__(self) -> None:
        for name, low in (("num_workers", 0), ("accumulate", 1), ("keep_checkpoints", 1)):
            check_count(name, getattr(self, name), low)
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes} must be a number of at least 0.")

    def micro_batch(self, batch_size: int, world_size: int) -> int:
        """Crops of one forward pass. ``ValueError`` if the batch does not divide."""
        if batch_size % (world_size * self.accumulate):
            raise ValueError(
                f"batch_size={batch_size} does not divide into {world_size} GPUs (processes) × accumulate="
                f"{self.accumulate} micro-batches."
            )
        return batch_size // (world_size * self.accumulate)


BYTES_OF_STATE = 16
"""A parameter, its gradient, and AdamW's two moments, in fp32."""


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Defaults that ``hiendmae_pretrain -preset`` starts from."""

    encoder: EncoderConfig
    crop_size: Size
    decoder_embed_dim: int
    decoder_num_heads: int
    batch_size: int
    crops_per_case: int
    epochs: int
    """Passes over the cases if neither -steps nor -epochs is given."""
    is_published: bool = False
    """At these sizes the run is the authors'."""

    def model(self, *, crop_size: Size, patch_size: Size, in_channels: int, **choices: Any) -> ModelConfig:
        """The preset's model for a crop, patch and channels; ``choices`` are further fields of ModelConfig."""
        return ModelConfig(
            **{**self.encoder.common(), "in_channels": in_channels, "patch_size": patch_size},
            encoder_options=self.encoder.options(),
            **choices,
            img_size=crop_size,
            decoder_embed_dim=self.decoder_embed_dim,
            decoder_num_heads=self.decoder_num_heads,
            decoder_self_depth=2,
        )


# The published runs use 24 cases × 8 crops per GPU on 4 GPUs for 1000 epochs; batch_size is one GPU's share.
PUBLISHED = {"crop_size": (96, 96, 96), "batch_size": 192, "crops_per_case": 8, "epochs": 1000, "is_published": True}
# Tokens of 8³ voxels are 1,728 in that crop, 3.4 times those of 12³: a quarter of the crops a step.
SMALL_TOKENS = {**PUBLISHED, "batch_size": 48, "is_published": False}
PRESETS: dict[str, Preset] = {
    "pico": Preset(
        encoder=ENCODERS["pico"],
        crop_size=(32, 32, 32),
        decoder_embed_dim=72,
        decoder_num_heads=3,
        batch_size=8,
        crops_per_case=1,
        epochs=100,
    ),
    "nano": Preset(
        encoder=ENCODERS["nano"],
        crop_size=(32, 32, 32),
        decoder_embed_dim=72,
        decoder_num_heads=3,
        batch_size=8,
        crops_per_case=1,
        epochs=100,
    ),
    "tiny": Preset(
        encoder=ENCODERS["tiny"],
        crop_size=(48, 48, 48),
        decoder_embed_dim=96,
        decoder_num_heads=4,
        batch_size=8,
        crops_per_case=1,
        epochs=100,
    ),
    "small_p12": Preset(encoder=ENCODERS["small_p12"], decoder_embed_dim=192, decoder_num_heads=6, **PUBLISHED),  # type: ignore[arg-type]
    "base_p16": Preset(encoder=ENCODERS["base_p16"], decoder_embed_dim=384, decoder_num_heads=12, **PUBLISHED),  # type: ignore[arg-type]
    "large_p16": Preset(encoder=ENCODERS["large_p16"], decoder_embed_dim=528, decoder_num_heads=16, **PUBLISHED),  # type: ignore[arg-type]
    "large_p12": Preset(encoder=ENCODERS["large_p12"], decoder_embed_dim=528, decoder_num_heads=16, **PUBLISHED),  # type: ignore[arg-type]
    "primus_s": Preset(encoder=ENCODERS["primus_s"], decoder_embed_dim=192, decoder_num_heads=6, **SMALL_TOKENS),  # type: ignore[arg-type]
    "primus_b": Preset(encoder=ENCODERS["primus_b"], decoder_embed_dim=384, decoder_num_heads=12, **SMALL_TOKENS),  # type: ignore[arg-type]
    "primus_m": Preset(encoder=ENCODERS["primus_m"], decoder_embed_dim=432, decoder_num_heads=12, **SMALL_TOKENS),  # type: ignore[arg-type]
}
