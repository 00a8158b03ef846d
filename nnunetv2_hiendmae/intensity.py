"""One intensity domain for every data set: HU clipped to a window and scaled to [0, 1].

nnU-Net stores images in the domain of its plans. For CT that domain is affine in HU inside the plans' clip range, so
the map onto the canonical domain is affine too and known for every data set:

    canonical = clip(scale · x + shift, 0, 1)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_hiendmae.channels import Evidence, holds_hu, hu_evidence

Window = tuple[float, float]

DEFAULT_WINDOW: Window = (-175.0, 250.0)
"""HU window of the published pre-training."""


def check_window(window: Window) -> None:
    """``ValueError`` unless both ends are finite and the first is below the second."""
    low, high = window
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"window_hu={tuple(window)} is empty: its first value must be below the second.")


AIR_HU = -1000.0

IMAGE_BY_IMAGE = ("ZScoreNormalization", "RescaleTo01Normalization")
"""nnU-Net's schemes that use each image's own statistics, which are stored nowhere: they cannot be undone."""


@dataclass(frozen=True, kw_only=True)
class ChannelIntensity:
    """How one image channel of a plan maps onto the canonical domain."""

    scale: float = 1.0
    shift: float = 0.0
    is_ct: bool = False
    """False: nnU-Net's own normalisation is kept (scale 1, shift 0, no clip)."""
    clip_hu: Window = (-math.inf, math.inf)
    """HU range that survives the plan's own clipping."""
    stored_air: float = 0.0
    """Air in the plan's domain. nnU-Net pads with 0 instead, which after ``CTNormalization`` is the mean."""
    note: str = ""
    """How the channel reaches the encoder, for people."""
    is_doubtful: bool = False
    """Whether ``note`` says that it does not reach the encoder as what it is."""

    @property
    def air(self) -> float:
        """Canonical value of air: 0 unless the plan's clip cuts into the window."""
        return min(max(self.scale * self.stored_air + self.shift, 0.0), 1.0) if self.is_ct else 0.0

    def cuts(self, window: Window) -> bool:
        """Whether the plan's clip range removes part of the window."""
        return self.is_ct and (self.clip_hu[0] > window[0] or self.clip_hu[1] < window[1])


def channel_intensity(scheme: str, properties: dict[str, Any], window: Window, name: str = "") -> ChannelIntensity:
    """Map of one channel from its plan's domain to the canonical one.

    A channel is CT if its scheme keeps HU and its values can be HU; the map is then exact inside the plan's clip.

    Args:
        scheme: nnU-Net normalisation scheme of the channel, e.g. ``CTNormalization``.
        properties: ``foreground_intensity_properties_per_channel[c]`` of the plans.
        window: canonical window in HU.
        name: of the channel in dataset.json; only ``note`` depends on it.

    Raises:
        ValueError: the window is empty.
    """
    check_window(window)
    evidence = hu_evidence(properties)
    domain = hu_domain(scheme, properties)
    if domain is None or evidence is Evidence.NO or (scheme == "NoNormalization" and evidence is Evidence.UNCLEAR):
        return ChannelIntensity(**keep_note(scheme, evidence, properties, name))
    offset, unit, clip = domain
    low, high = window
    width = high - low
    air = (min(max(AIR_HU, clip[0]), clip[1]) - offset) / unit
    unclear = evidence is Evidence.UNCLEAR and "percentile_00_5" in properties
    note = f"{scheme}, mapped onto the window from HU" + unclear * (
        f", though its values ({value_range(properties)}) have none of CT's below 0: check that the rescale intercept "
        f"was applied, or name the channel in dataset.json as what it is, plan and preprocess again"
    )
    return ChannelIntensity(
        scale=unit / width, shift=(offset - low) / width, is_ct=True, clip_hu=clip, stored_air=air,
        note=note, is_doubtful=unclear,
    )  # fmt: skip


def hu_domain(scheme: str, properties: dict[str, Any]) -> tuple[float, float, Window] | None:
    """HU at the stored value 0, HU per stored unit, and the HU range kept; None where no rule leads back to HU."""
    if scheme == "CTNormalization":  # x = (clip(HU) - mean) / std
        clip = (float(properties["percentile_00_5"]), float(properties["percentile_99_5"]))
        return properties["mean"], max(properties["std"], 1e-8), clip
    if scheme == "HUWindowNormalization":  # x = (clip(HU) - a) / (b - a)
        a, b = float(properties["window_lower"]), float(properties["window_upper"])
        return a, b - a, (a, b)
    if scheme == "NoNormalization":
        return 0.0, 1.0, (-math.inf, math.inf)
    return None


def keep_note(scheme: str, evidence: Evidence, properties: dict[str, Any], name: str) -> dict[str, Any]:
    """``note`` and ``is_doubtful`` of a channel that reaches the encoder as nnU-Net normalised it."""
    kept = f"reaches the encoder as {scheme} left it"
    if scheme in ("CTNormalization", "HUWindowNormalization"):
        return {
            "note": f"{scheme}, but its values ({value_range(properties)}) are no HU: it {kept}. Name it in "
            f"dataset.json as what it is (PET, MRI …), plan and preprocess again",
            "is_doubtful": True,
        }
    if holds_hu(name, properties) and scheme != "NoNormalization":
        how = "uses each image's own statistics and" if scheme in IMAGE_BY_IMAGE else "is not known here and"
        return {
            "note": f"CT, but {scheme} {how} cannot be undone: it {kept}, not as the HU that the encoder was trained "
            f"on. Plan with -pl HiEndMAEPlanner, or name the channel CT in dataset.json; then preprocess again",
            "is_doubtful": True,
        }
    if scheme == "NoNormalization" and evidence is Evidence.UNCLEAR:
        return {
            "note": f"its values ({value_range(properties)}) are not clearly HU: it {kept}. If they are, name "
            f"the channel CT in dataset.json, plan and preprocess again",
            "is_doubtful": True,
        }
    return {"note": f"no CT; it {kept}", "is_doubtful": False}


def value_range(properties: dict[str, Any]) -> str:
    """Percentiles of the plans' statistics, for people."""
    if "percentile_00_5" not in properties:
        return "not known"
    return f"{properties['percentile_00_5']:g}…{properties['percentile_99_5']:g}"


def plan_intensities(
    plans: dict[str, Any], configuration: dict[str, Any], window: Window, names: Sequence[str] = ()
) -> list[ChannelIntensity]:
    """Maps of all image channels of one (inheritance-resolved) configuration of nnU-Net plans.

    ``names`` are those of dataset.json; they only make the notes clearer.
    """
    properties = plans["foreground_intensity_properties_per_channel"]
    return [
        channel_intensity(scheme, properties[str(c)], window, names[c] if c < len(names) else "")
        for c, scheme in enumerate(configuration["normalization_schemes"])
    ]


def channel_lines(channels: Sequence[ChannelIntensity], names: Sequence[str] = ()) -> list[str]:
    """One line a channel: what reaches the encoder. Doubtful ones begin with WARNING."""
    return [
        f"{'WARNING: ' if channel.is_doubtful else ''}channel {c}{f' ({names[c]})' if c < len(names) else ''}: "
        f"{channel.note}."
        for c, channel in enumerate(channels)
    ]


def clip_warning(channels: list[ChannelIntensity], window: Window, plans_name: str) -> str | None:
    """One sentence with both ranges if the plans cut into the window, else None."""
    cut = [f"channel {c}: {i.clip_hu[0]:g}…{i.clip_hu[1]:g} HU" for c, i in enumerate(channels) if i.cuts(window)]
    if not cut:
        return None
    if DEFAULT_WINDOW[0] <= window[0] and window[1] <= DEFAULT_WINDOW[1]:
        remedy = "Plans made with -pl HiEndMAEPlanner keep the whole window."
    else:
        remedy = "Wider intensity bounds in the plans, and preprocessing anew, would keep the whole window."
    return (
        f"{plans_name} clip images to {', '.join(cut)}, which cuts into the window {window[0]:g}…{window[1]:g} HU "
        f"the encoder was trained on. Values beyond the clip arrive as its limit. {remedy}"
    )


def hu_to_canonical(window: Window) -> tuple[float, float]:
    """Scale and shift from HU to the canonical domain."""
    low, high = window
    return 1 / (high - low), -low / (high - low)


def to_canonical(stored: Any, scale: Any, shift: Any) -> Any:
    """``clip(scale · stored + shift, 0, 1)`` of an array or a tensor; ``scale`` and ``shift`` broadcast over voxels."""
    return (stored * scale + shift).clip(0, 1)


class CanonicalIntensity(nn.Module):
    """The map as a network layer, made from the plans in use.

    Its values are no part of checkpoints: nnU-Net saves the plans beside them, and ``-pretrained_weights`` must not
    bring the map of other plans along.
    """

    scale: Tensor
    shift: Tensor
    is_ct: Tensor
    air: Tensor
    stored_air: Tensor

    def __init__(self, channels: list[ChannelIntensity]) -> None:
        super().__init__()
        self.pads_with_air = all(c.stored_air == 0 for c in channels)
        """Whether 0, which nnU-Net pads with, is air in every channel."""
        for name in ("scale", "shift", "is_ct", "air", "stored_air"):
            values = torch.tensor([getattr(c, name) for c in channels]).view(1, len(channels), 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def identity(cls, num_channels: int) -> CanonicalIntensity:
        """For input that is canonical already: nothing is changed, nothing clipped."""
        return cls([ChannelIntensity()] * num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W, D)`` in the plan's domain to the canonical one, same shape."""
        return torch.where(self.is_ct, to_canonical(x, self.scale, self.shift), x)

    def fill_padding(self, x: Tensor) -> Tensor:
        """``(B, C, H, W, D)`` in the plan's domain with air where nnU-Net padded its CT channels with 0."""
        if self.pads_with_air:
            return x
        padded = padded_by_nnunet(x, self.is_ct) & self.is_ct
        return torch.where(padded, self.stored_air.to(x.dtype), x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Checkpoints of version 0.1 carry the map."""
        for name in ("scale", "shift", "is_ct"):
            saved = state_dict.pop(prefix + name, None)
            if saved is not None and not torch.allclose(saved.float().cpu(), getattr(self, name).float().cpu()):
                warnings.warn(
                    "This checkpoint was trained with other intensities than its plans describe (an older version "
                    "took them over with -pretrained_weights); its predictions are unreliable. Train it again.",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def padded_by_nnunet(x: Tensor, is_ct: Tensor) -> Tensor:
    """Mask ``(B, 1, H, W, D)`` of the planes at the faces of ``x`` ``(B, C, H, W, D)`` in which all CT voxels are 0.

    nnU-Net pads crops that reach beyond the image, and images smaller than the patch, with 0. In normalised CT no
    whole plane at the border is exactly 0 otherwise.
    """
    content = ((x != 0) & is_ct).any(1, keepdim=True)
    inside = torch.ones_like(content)
    for axis in (2, 3, 4):
        planes = content.amax([a for a in (2, 3, 4) if a != axis], keepdim=True).int()
        inside &= (planes.cumsum(axis) > 0) & (planes.flip(axis).cumsum(axis).flip(axis) > 0)
    return ~inside
