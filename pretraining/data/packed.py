"""Corpus back end for packed data: canonical intensities of 8 or 16 bits, memory-mapped, found through one index.

A packed folder holds ``index.npz`` and ``index.json`` (all cases of all data sets), and shards of 64 cases:
``shard_00000.voxels`` (volumes back to back, C order) and ``shard_00000.body.npy`` (their body cells).
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.crops import read_padded
from pretraining.data.corpus import DataSetInfo, remember
from pretraining.prepare.provenance import refuse_excluded

INDEX_ARRAYS, INDEX = "index.npz", "index.json"
FORMAT_VERSION = 1
PACKED = "packed"
"""What runs on packed data have for a plans name."""
DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 16: np.dtype(np.int16)}
OPEN_SHARDS = 256
"""Mapped at once by a process; 16,000 cases."""


def quantise(canonical: np.ndarray, bits: int) -> np.ndarray:
    """Canonical values in [0, 1] to 2^bits levels; a step is 1.67 HU for 8 bits of the default window, 0.006 for 16."""
    levels = 2**bits - 1
    offset = 0 if bits == 8 else -(2 ** (bits - 1))  # torch computes with int16, hardly with uint16
    return np.add(np.rint(canonical * levels), offset).astype(DTYPES[bits])


def dequantisation(bits: int) -> tuple[float, float]:
    """Scale and shift that invert ``quantise``."""
    levels = 2**bits - 1
    return 1 / levels, 0.0 if bits == 8 else 2 ** (bits - 1) / levels


def shard_file(folder: Path, shard: int, kind: str) -> Path:
    """``kind`` is "voxels", "body.npy" or "entries.json"."""
    return folder / f"shard_{shard:05d}.{kind}"


class PackedCorpus:
    """Cases of a packed folder. Opening reads the index alone; shards are mapped when first read.

    Raises:
        ValueError: no finished packed folder, or one of a newer version.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file() or not (folder / INDEX_ARRAYS).is_file():
            raise ValueError(f"{folder} holds no finished packed corpus ({INDEX} is missing). Run 'hiendmae_pack'.")
        try:
            self.header = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            with np.load(folder / INDEX_ARRAYS, allow_pickle=False) as arrays:
                self.index = {name: arrays[name] for name in arrays.files}
            if self.header["version"] > FORMAT_VERSION:
                raise ValueError(f"format {self.header['version']} is newer than this version's {FORMAT_VERSION}")
            self._read_header()
        except (OSError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The index of {folder} cannot be read ({error}). Remove {INDEX}; pack again.") from None
        self.folder = folder
        cases = [self.name(i).split("/", 1) for i in range(len(self))]
        for d in self.datasets:
            refuse_excluded(d.name, [case for name, case in cases if name == d.name], "Pack again, with another -o.")
        self.warnings: list[str] = []  # hiendmae_pack printed them
        self.origin = {
            "datasets": tuple(d.name for d in self.datasets),
            "plans": PACKED,
            "configuration": folder.name,
            "window_hu": self.window,
            "packed_bits": self.bits,
        }
        self._shards: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Mapped files do not travel to loader processes."""
        return {**self.__dict__, "_shards": OrderedDict()}

    def _read_header(self) -> None:
        header = self.header
        self.bits, self.in_channels = int(header["bits"]), int(header["in_channels"])
        self.window = (float(header["window_hu"][0]), float(header["window_hu"][1]))
        self.datasets = tuple(DataSetInfo(d["name"], d["num_cases"], tuple(d["spacing"])) for d in header["datasets"])
        self.dtype = DTYPES[self.bits]
        self.air = [np.array(d["air"], DTYPES[self.bits]) for d in header["datasets"]]
        self._intensity = np.tile(np.array(dequantisation(self.bits), np.float32), (self.in_channels, 1))
        counts = {len(values) for name, values in self.index.items() if name not in ("names", "name_ends")}
        if counts != {sum(d.num_cases for d in self.datasets)}:
            raise ValueError("its arrays differ in length")

    def __len__(self) -> int:
        return len(self.index["shape"])

    def name(self, case: int) -> str:
        end = int(self.index["name_ends"][case])
        begin = int(self.index["name_ends"][case - 1]) if case else 0
        return f"{self.dataset(case).name}/{self.index['names'][begin:end].tobytes().decode()}"

    def dataset(self, case: int) -> DataSetInfo:
        return self.datasets[self.index["dataset"][case]]

    def shape(self, case: int) -> Size:
        h, w, d = self.index["shape"][case].tolist()
        return h, w, d

    def content_mark(self, case: int) -> int:
        return int(self.index["crc32"][case])

    def intensity(self, case: int) -> np.ndarray:
        return self._intensity

    def body_cells(self, case: int) -> np.ndarray:
        cells = self._map(int(self.index["shard"][case]), "body.npy")
        start, count = int(self.index["body_start"][case]), int(self.index["body_count"][case])
        return cells[start : start + count]

    def volume(self, case: int) -> np.ndarray:
        """The case's ``(C, H, W, D)`` quantised voxels, mapped."""
        shard, start = int(self.index["shard"][case]), int(self.index["voxel_start"][case])
        voxels = self._map(shard, "voxels")
        shape = (self.in_channels, *self.shape(case))
        end = start + math.prod(shape)
        if end > len(voxels):
            file = shard_file(self.folder, shard, "voxels")
            raise ValueError(f"{file} is cut off. Check with 'hiendmae_pack --verify'; pack again.")
        return voxels[start:end].reshape(shape)

    def read(self, case: int, start: Size, size: Size) -> np.ndarray:
        return read_padded(self.volume(case), start, size, self.air[self.index["dataset"][case]])

    def _map(self, shard: int, kind: str) -> Any:
        """Read-only map, which costs no memory of its own, also where a machine counts what could be written."""
        if (shard, kind) not in self._shards:
            file = shard_file(self.folder, shard, kind)
            try:
                if file.suffix == ".npy":
                    mapped = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
                else:
                    mapped = np.asarray(np.memmap(file, DTYPES[self.bits], mode="r"))
            except (OSError, EOFError, ValueError) as error:
                raise ValueError(f"Cannot read {file} ({error}). Check with 'hiendmae_pack --verify'.") from None
            with warnings.catch_warnings():  # torch warns, once a process, that nobody must write here; nobody does
                warnings.simplefilter("ignore")
                torch.from_numpy(mapped[:0])
            remember(self._shards, (shard, kind), mapped, 2 * OPEN_SHARDS)
        return self._shards[shard, kind]
