"""Corpus back end that reads nnU-Net's ``.b2nd`` volumes in place; nothing to prepare."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_hiendmae.channels import channel_names
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.crops import read_padded
from nnunetv2_hiendmae.files import dataset_names, preprocessed_folder, read_json, read_plans
from nnunetv2_hiendmae.intensity import (
    DEFAULT_WINDOW,
    ChannelIntensity,
    Window,
    channel_lines,
    clip_warning,
    plan_intensities,
)
from pretraining.data.corpus import (
    DataSetInfo,
    affine,
    air_values,
    canonical_volume,
    find_body_cells,
    remember,
)
from pretraining.prepare.provenance import refuse_excluded

OURS = "HiEndMAEPlans"
OPEN_VOLUMES = 32
MARKED_BYTES = 2**14
BODY_MAPS = 1024
"""Kept in memory, some 50 kB each."""


@dataclass(frozen=True)
class DataSet:
    """One nnU-Net data set as preprocessed by one plans configuration."""

    name: str
    folder: Path
    cases: tuple[str, ...]
    spacing: tuple[float, float, float]
    """In mm, in the axis order of the volumes."""
    channels: tuple[ChannelIntensity, ...]
    window: Window
    warnings: tuple[str, ...]
    """If the plans cut into the HU window, or channels may not be what they are taken for."""
    plans: str
    configuration: str

    @classmethod
    def open(cls, name_or_id: str, plans_name: str, configuration: str, window: Window) -> DataSet:
        """Find the preprocessed volumes of a data set.

        Raises:
            ValueError: data set, plans, configuration or volumes are missing, or a channel is not CT; says what to do.
        """
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # not above: it takes half a second

        base = preprocessed_folder(name_or_id)
        name = base.name
        plans_file = base / f"{plans_name}.json"
        plans = PlansManager(read_plans(plans_file, f"Run 'nnUNetv2_plan_and_preprocess -d {name}' first."))
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
        refuse_excluded(
            name, cases, f"Run 'hiendmae_plan_and_preprocess -d {name}', or delete their files in {folder}."
        )
        description = base / "dataset.json"
        names = channel_names(read_json(description)) if description.is_file() else []
        channels = plan_intensities(plans.plans, manager.configuration, window, names)
        if not all(channel.is_ct for channel in channels):
            lines = [line for c, line in zip(channels, channel_lines(channels, names), strict=True) if not c.is_ct]
            raise ValueError(f"{name}: pre-training needs HU in every channel. {' '.join(lines)}")
        doubts = [f"{name}: {line}" for c, line in zip(channels, channel_lines(channels), strict=True) if c.is_doubtful]
        cut = clip_warning(channels, window, f"{name}: {plans_name}")
        h, w, d = manager.spacing
        return cls(
            name,
            folder,
            tuple(cases),
            (float(h), float(w), float(d)),
            tuple(channels),
            window,
            (*doubts, *([cut] if cut else [])),
            plans_name,
            configuration,
        )

    @property
    def info(self) -> DataSetInfo:
        return DataSetInfo(self.name, len(self.cases), self.spacing)


def default_plans(datasets: Sequence[str]) -> str:
    """HiEndMAEPlans where every data set has them, else nnUNetPlans."""
    folders = [preprocessed_folder(d) for d in datasets]
    return OURS if all((f / f"{OURS}.json").is_file() for f in folders) else "nnUNetPlans"


def open_b2nd(
    datasets: Sequence[str], plans: str | None, configuration: str | None, window: Window | None
) -> PreprocessedCorpus:
    """All cases of preprocessed data sets, named or numbered. ``ValueError`` as ``DataSet.open``."""
    plans, configuration, window = (
        plans or default_plans(datasets),
        configuration or "3d_fullres",
        window or DEFAULT_WINDOW,
    )
    return PreprocessedCorpus([DataSet.open(d, plans, configuration, window) for d in dataset_names(datasets)])


class PreprocessedCorpus:
    """All cases of several data sets in one list.

    Body maps are made at a case's first visit and kept beside the data set, where later runs and other processes find
    them; in memory only, where the folder cannot be written.
    """

    def __init__(self, datasets: list[DataSet]) -> None:
        counts = {len(d.channels) for d in datasets}
        if len(counts) != 1:
            shown = ", ".join(f"{d.name}: {len(d.channels)}" for d in datasets)
            raise ValueError(f"The data sets differ in their number of channels ({shown}).")
        self.sources = datasets
        self.datasets = tuple(d.info for d in datasets)
        self.in_channels = len(datasets[0].channels)
        self.dtype = np.dtype(np.float32)
        self.warnings = [warning for d in datasets for warning in d.warnings]
        self.origin = {
            "datasets": tuple(d.name for d in datasets),
            "plans": datasets[0].plans,
            "configuration": datasets[0].configuration,
            "window_hu": datasets[0].window,
        }
        self.cases = [(d, case) for d in datasets for case in d.cases]
        self._volumes: OrderedDict[int, Any] = OrderedDict()
        self._body: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to loader processes."""
        return {**self.__dict__, "_volumes": OrderedDict()}

    def subset(self, cases: range) -> PreprocessedCorpus:
        """Some of the cases, renumbered from 0, of the same data sets in the same order."""
        chosen: list[list[str]] = [[] for _ in self.sources]
        first = np.cumsum([0, *(len(d.cases) for d in self.sources)])
        for case in cases:
            chosen[int(np.searchsorted(first, case, "right")) - 1].append(self.cases[case][1])
        return PreprocessedCorpus([replace(d, cases=tuple(c)) for d, c in zip(self.sources, chosen, strict=True)])

    def __len__(self) -> int:
        return len(self.cases)

    def name(self, case: int) -> str:
        source, name = self.cases[case]
        return f"{source.name}/{name}"

    def dataset(self, case: int) -> DataSetInfo:
        return self.cases[case][0].info

    def shape(self, case: int) -> Size:
        h, w, d = self.volume(case).shape[1:]
        return int(h), int(w), int(d)

    def intensity(self, case: int) -> np.ndarray:
        return affine(self.cases[case][0].channels)

    def content_mark(self, case: int) -> int:
        """Of the file's size and three parts: the beginning has the shape, the end the places of all chunks."""
        source, name = self.cases[case]
        file = source.folder / f"{name}.b2nd"
        try:
            with open(file, "rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                places = (0, size // 2, max(size - MARKED_BYTES, 0))
                parts = [os.pread(stream.fileno(), MARKED_BYTES, place) for place in places]
        except OSError as error:
            raise ValueError(f"Cannot read {file} ({error}). Preprocess this case again.") from None
        return zlib.crc32(b"".join([str(size).encode(), *parts]))

    def volume(self, case: int) -> Any:
        """The case's ``(C, H, W, D)`` float array on disk, in its plan's intensities. ``ValueError`` if damaged."""
        if case not in self._volumes:
            source, name = self.cases[case]
            file = source.folder / f"{name}.b2nd"
            try:
                volume = blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
            except (RuntimeError, OSError, ValueError) as error:
                raise ValueError(f"Cannot read {file} ({error}). Preprocess this case again.") from None
            remember(self._volumes, case, volume, OPEN_VOLUMES)
        return self._volumes[case]

    def read(self, case: int, start: Size, size: Size) -> np.ndarray:
        intensity, channels = self.intensity(case), self.cases[case][0].channels
        air = (air_values(channels) - intensity[:, 1]) / intensity[:, 0]
        try:
            return read_padded(self.volume(case), start, size, air)
        except RuntimeError as error:
            raise ValueError(f"Cannot read {self.name(case)}.b2nd ({error}). Preprocess this case again.") from None

    def body_cells(self, case: int) -> np.ndarray:
        if case not in self._body:
            source, name = self.cases[case]
            file = source.folder.with_name(body_folder(source)) / f"{name}.npy"
            volume_file = source.folder / f"{name}.b2nd"
            cells = None
            if file.is_file() and file.stat().st_mtime >= volume_file.stat().st_mtime:
                with suppress(OSError, EOFError, ValueError):  # a file that a crash of the node left unfinished
                    cells = np.load(file, allow_pickle=False)
            if cells is None:
                canonical = canonical_volume(self.read(case, (0, 0, 0), self.shape(case)), self.intensity(case))
                cells = find_body_cells(canonical, air_values(source.channels))
                keep(cells, file)
            remember(self._body, case, cells, BODY_MAPS)
        return self._body[case]


def body_folder(source: DataSet) -> str:
    """Folder of the body maps, beside that of the volumes; they depend on the window."""
    return f"{source.folder.name}_body_{source.window[0]:g}_{source.window[1]:g}"


def keep(cells: np.ndarray, file: Path) -> None:
    """Save a body map. Where the folder cannot be written the map stays in memory: the file only saves time."""
    # Loader processes that visit a case at once must not write into one temporary file.
    unfinished = file.with_name(f"{file.stem}.{os.getpid()}.tmp.npy")
    with suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        try:
            np.save(unfinished, cells)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
