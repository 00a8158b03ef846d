"""One intensity domain for every data set: HU clipped to a window and scaled to [0, 1].

nnU-Net stores images in the domain of its plans. For CT that domain is affine in HU inside the plans' clip range, so
the map onto the canonical domain is affine too and known for every data set:

    canonical = clip(scale · x + shift, 0, 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Window = tuple[float, float]

DEFAULT_WINDOW: Window = (-175.0, 250.0)
"""HU window of the published pre-training."""


def check_window(window: Window) -> None:
    """``ValueError`` unless both ends are finite and the first is below the second."""
    low, high = window
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"The HU window {tuple(window)} is empty: its first value must be below the second.")


@dataclass(frozen=True)
class ChannelIntensity:
    """How one image channel of a plan maps onto the canonical domain."""

    scale: float
    shift: float
    is_ct: bool
    """False: nnU-Net's own normalisation is kept (scale 1, shift 0, no clip)."""
    clip_hu: Window = (-float("inf"), float("inf"))
    """HU range that survives the plan's own clipping."""
    air: float = 0.0
    """Canonical value of the plan's lowest intensity: 0 unless its clip cuts into the window."""

    def cuts(self, window: Window) -> bool:
        """Whether the plan's clip range removes part of the window."""
        return self.is_ct and (self.clip_hu[0] > window[0] or self.clip_hu[1] < window[1])


def channel_intensity(scheme: str, properties: dict[str, Any], window: Window) -> ChannelIntensity:
    """Map of one channel from its plan's domain to the canonical one.

    Args:
        scheme: nnU-Net normalisation scheme of the channel, e.g. ``CTNormalization``.
        properties: ``foreground_intensity_properties_per_channel[c]`` of the plans.
        window: canonical window in HU.

    Raises:
        ValueError: the window is empty.
    """
    check_window(window)
    low, high = window
    width = high - low
    if scheme == "CTNormalization":  # x = (clip(HU) - mean) / std
        mean, std = properties["mean"], max(properties["std"], 1e-8)
        clip = (float(properties["percentile_00_5"]), float(properties["percentile_99_5"]))
        return ChannelIntensity(std / width, (mean - low) / width, True, clip, max(clip[0] - low, 0.0) / width)
    if scheme == "HUWindowNormalization":  # x = (clip(HU) - a) / (b - a)
        a, b = properties["window_lower"], properties["window_upper"]
        return ChannelIntensity(
            (b - a) / width, (a - low) / width, True, (float(a), float(b)), max(a - low, 0.0) / width
        )
    return ChannelIntensity(1.0, 0.0, False)


def plan_intensities(plans: dict[str, Any], configuration: dict[str, Any], window: Window) -> list[ChannelIntensity]:
    """Maps of all image channels of one (inheritance-resolved) configuration of nnU-Net plans."""
    properties = plans["foreground_intensity_properties_per_channel"]
    return [
        channel_intensity(scheme, properties[str(c)], window)
        for c, scheme in enumerate(configuration["normalization_schemes"])
    ]


def clip_warning(channels: list[ChannelIntensity], window: Window, plans_name: str) -> str | None:
    """One sentence with both ranges if the plans cut into the window, else None."""
    cut = [f"channel {c}: {i.clip_hu[0]:g}…{i.clip_hu[1]:g} HU" for c, i in enumerate(channels) if i.cuts(window)]
    if not cut:
        return None
    return (
        f"{plans_name} clip images to {', '.join(cut)}, which cuts into the window {window[0]:g}…{window[1]:g} HU "
        f"the encoder was trained on. Values beyond the clip arrive as its limit. Plans made with "
        f"-pl HiEndMAEPlanner keep the whole window."
    )


class CanonicalIntensity(nn.Module):
    """The map as a network layer. Its values are buffers, so checkpoints carry them and inference agrees."""

    scale: Tensor
    shift: Tensor
    is_ct: Tensor

    def __init__(self, channels: list[ChannelIntensity]) -> None:
        super().__init__()
        shape = (1, len(channels), 1, 1, 1)
        self.register_buffer("scale", torch.tensor([c.scale for c in channels]).view(shape))
        self.register_buffer("shift", torch.tensor([c.shift for c in channels]).view(shape))
        self.register_buffer("is_ct", torch.tensor([c.is_ct for c in channels]).view(shape))

    @classmethod
    def identity(cls, num_channels: int) -> CanonicalIntensity:
        """For input that is canonical already: nothing is changed, nothing clipped."""
        return cls([ChannelIntensity(1.0, 0.0, False)] * num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W, D)`` in the plan's domain to the canonical one, same shape."""
        x = x * self.scale + self.shift
        return torch.where(self.is_ct, x.clamp(0, 1), x)
