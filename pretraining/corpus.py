"""Where crops come from: nnU-Net's preprocessed volumes, read in place.

Volumes are ``(C, H, W, D)`` in nnU-Net's axis order; crops come out canonical (HU window scaled to [0, 1]).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.folders import preprocessed_folder
from nnunetv2_hiendmae.intensity import ChannelIntensity, Window, clip_warning, plan_intensities

Size = tuple[int, int, int]

BODY_CELL = 8
"""Edge in voxels of a cell of the coarse body map."""


@dataclass(frozen=True)
class DataSet:
    """One nnU-Net data set as preprocessed by one plans configuration."""

    name: str
    folder: Path
    cases: tuple[str, ...]
    spacing: tuple[float, float, float]
    """In mm, in the axis order of the volumes."""
    channels: tuple[ChannelIntensity, ...]
    warning: str | None
    """Set if the plans cut into the HU window."""

    @classmethod
    def open(cls, name_or_id: str, plans_name: str, configuration: str, window: Window) -> DataSet:
        """Find the preprocessed volumes of a data set.

        Raises:
            ValueError: data set, plans, configuration or volumes are missing, or a channel is not CT; says what to do.
        """
        base = preprocessed_folder(name_or_id)
        name = base.name
        plans_file = base / f"{plans_name}.json"
        if not plans_file.is_file():
            raise ValueError(f"{plans_file} does not exist. Run 'nnUNetv2_plan_and_preprocess -d {name}' first.")
        plans = PlansManager(load_json(str(plans_file)))
        if configuration not in plans.available_configurations:
            known = ", ".join(plans.available_configurations)
            raise ValueError(f"{plans_file} has no configuration '{configuration}' (-c); it has: {known}.")
        manager = plans.get_configuration(configuration)
        if len(manager.spacing) != 3:
            raise ValueError(f"Configuration '{configuration}' (-c) is not 3D.")
        folder = base / manager.data_identifier
        cases = sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder))) if folder.is_dir() else []
        if not cases:
            raise ValueError(
                f"{folder} holds no preprocessed .b2nd volumes. Run "
                f"'nnUNetv2_preprocess -d {name} -plans_name {plans_name} -c {configuration}' first."
            )
        channels = plan_intensities(plans.plans, manager.configuration, window)
        if not all(channel.is_ct for channel in channels):
            raise ValueError(
                f"{name}: {manager.normalization_schemes} are not all CT normalisations; their intensities have no HU. "
                f"Pre-training needs channels named 'CT' in dataset.json."
            )
        warning = clip_warning(channels, window, f"{name}: {plans_name}")
        h, w, d = manager.spacing
        return cls(name, folder, tuple(cases), (float(h), float(w), float(d)), tuple(channels), warning)


@dataclass
class Corpus:
    """All cases of several data sets in one list. Reading keeps no file open and no volume in memory."""

    datasets: list[DataSet]
    _body: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts = {len(d.channels) for d in self.datasets}
        if len(counts) != 1:
            shown = ", ".join(f"{d.name}: {len(d.channels)}" for d in self.datasets)
            raise ValueError(f"The data sets differ in their number of channels ({shown}).")
        self.cases = [(d, case) for d in self.datasets for case in d.cases]

    @property
    def in_channels(self) -> int:
        return len(self.datasets[0].channels)

    def name(self, case: int) -> str:
        """``DataSet/case``, for people."""
        dataset, name = self.cases[case]
        return f"{dataset.name}/{name}"

    def volume(self, case: int) -> Any:
        """The case's ``(C, H, W, D)`` array on disk, in its plan's intensities.

        Raises:
            ValueError: the file is damaged; names it.
        """
        dataset, name = self.cases[case]
        file = dataset.folder / f"{name}.b2nd"
        try:
            return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"Cannot read {file} ({error}). Preprocess this case again.") from None

    def read(self, case: int, start: Size, size: Size) -> np.ndarray:
        """Canonical crop ``(C, *size)`` float32; what lies outside the volume is air."""
        volume, channels = self.volume(case), self.cases[case][0].channels
        low = [max(s, 0) for s in start]
        high = [min(s + n, edge) for s, n, edge in zip(start, size, volume.shape[1:], strict=True)]
        crop = np.empty((volume.shape[0], *size), np.float32)
        crop[:] = air(channels, 4)
        inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        crop[(slice(None), *inside)] = canonical(volume[(slice(None), *source)], channels)
        return crop

    def body_cells(self, case: int) -> np.ndarray:
        """``(n, 3)`` int16 indices of the coarse cells that are mostly tissue; computed once a process."""
        if case not in self._body:
            channels = self.cases[case][0].channels
            # A margin of 1 % of the window (4 HU) keeps rounding and resampling ripple from counting as tissue.
            tissue = (canonical(self.volume(case)[:], channels) > air(channels, 4) + 0.01).any(0)
            padded = np.pad(tissue, [(0, -n % BODY_CELL) for n in tissue.shape])
            share = padded.reshape([e for n in padded.shape for e in (n // BODY_CELL, BODY_CELL)]).mean((1, 3, 5))
            self._body[case] = np.argwhere(share > min(0.5, share.max() / 2)).astype(np.int16)
        return self._body[case]

    def choose_start(self, rng: np.random.Generator, case: int, size: Size, body_fraction: float) -> Size:
        """First voxel of a random crop: centred on tissue with probability ``body_fraction``, else anywhere.

        The crop is shifted to lie inside the volume; along an axis where the volume is smaller, the volume is placed
        at random inside the crop (the start is negative).
        """
        shape = self.volume(case).shape[1:]
        on_tissue = rng.random() < body_fraction
        cells = self.body_cells(case) if on_tissue else np.empty((0, 3))
        if len(cells):
            centre = cells[rng.integers(len(cells))].astype(int) * BODY_CELL + rng.integers(0, BODY_CELL, 3)
        else:
            centre = rng.integers(0, shape)
        start = [
            int(np.clip(c - n // 2, 0, edge - n)) if edge >= n else -int(rng.integers(0, n - edge + 1))
            for c, n, edge in zip(centre, size, shape, strict=True)
        ]
        return start[0], start[1], start[2]


def air(channels: tuple[ChannelIntensity, ...], ndim: int) -> np.ndarray:
    """Canonical value of air per channel, ``(C, 1, …)`` float32."""
    return np.array([c.air for c in channels], np.float32).reshape((-1, *(1,) * (ndim - 1)))


def canonical(x: np.ndarray, channels: tuple[ChannelIntensity, ...]) -> np.ndarray:
    """Plan intensities ``(C, …)`` to the canonical domain, float32 (the same map as ``CanonicalIntensity``)."""
    shape = (-1, *(1,) * (x.ndim - 1))
    scale = np.array([c.scale for c in channels], np.float32).reshape(shape)
    shift = np.array([c.shift for c in channels], np.float32).reshape(shape)
    return np.clip(x * scale + shift, 0, 1, dtype=np.float32)
