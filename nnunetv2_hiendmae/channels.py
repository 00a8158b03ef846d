"""What an image channel holds, judged from its values and its name: nnU-Net's plans go by the name alone."""

from __future__ import annotations

import math
import re
from enum import Enum
from typing import Any


class Evidence(Enum):
    """What intensity statistics say about HU."""

    NO = "no HU"
    UNCLEAR = "nothing below 0 HU"
    LIKELY = "HU"
    SURE = "HU with fat or air"


STATISTICS = ("min", "max", "median", "percentile_00_5", "percentile_99_5")


def hu_evidence(properties: dict[str, Any]) -> Evidence:
    """Whether ``foreground_intensity_properties_per_channel[c]`` of plans or a fingerprint are those of a CT.

    CT has what hardly any other modality has: values below 0 (fat -100, air -1000, noise around water) and bone in
    the hundreds, up to some thousands. PET, MR and windowed images start at 0; normalised ones span a few units.
    Without statistics nothing is said (UNCLEAR).
    """
    low, high, median, p_low, p_high = (float(properties.get(name, math.nan)) for name in STATISTICS)
    low = p_low if math.isnan(low) else low  # hand-made plans may have the percentiles only
    high = p_high if math.isnan(high) else high
    median = (p_low + p_high) / 2 if math.isnan(median) else median
    if not all(map(math.isfinite, (low, high, median, p_low, p_high))):
        return Evidence.UNCLEAR
    if high - low <= 20 or p_low < -1500 or not -1100 <= median <= 4000:
        return Evidence.NO
    if low <= -10 and low <= -0.02 * high and high - low >= 60:
        return Evidence.SURE if p_low <= -50 and p_high <= 4000 else Evidence.LIKELY
    if p_high > 4000 or (median < 20 and p_high <= 200):  # PET in Bq/ml, PET in SUV
        return Evidence.NO
    return Evidence.UNCLEAR


def holds_hu(name: str, properties: dict[str, Any]) -> bool:
    """Whether a channel holds HU, by its values, and by its name where these do not tell."""
    evidence = hu_evidence(properties)
    return evidence in (Evidence.LIKELY, Evidence.SURE) or (evidence is Evidence.UNCLEAR and names_ct(name))


MAPS = r"(?<![a-z])(?:cbf|cbv|mtt|tmax|ttp)(?![a-z])"
"""Perfusion maps."""


def names_ct(name: str) -> bool:
    """Whether a channel's name in dataset.json speaks of CT: ct, CTA, CBCT, CT_portal, "contrast CT", HU …

    Not "CT1", which is a contrast-enhanced T1 as often as a first CT, nor maps computed from CT (CBF, Tmax …).
    """
    words = r"(?<![a-z])(?:(?:cb|nc|ce|hr|ld|d|pet)?ct[avp]?|hu|hounsfield)(?![a-z1])|tomogra"
    return re.search(words, name.casefold()) is not None and re.search(MAPS, name.casefold()) is None


def names_other(name: str) -> bool:
    """Whether a channel's name speaks of another modality than CT: MR and its sequences, PET, ultrasound."""
    words = (
        MAPS + r"|(?<![a-z])(?:mri?|t1\w*|t2\w*|flair|adc|dwi|pd|swi|dixon|pet|suv|fdg|spect|us)(?![a-z])|ultrasound"
    )
    return re.search(words, name.casefold()) is not None and not names_ct(name)


def channel_names(dataset_json: dict[str, Any]) -> list[str]:
    """Names of the image channels in the order that nnU-Net plans them in; older data call them ``modality``."""
    return [str(name) for name in (dataset_json.get("channel_names") or dataset_json.get("modality") or {}).values()]
