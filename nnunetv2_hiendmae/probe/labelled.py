"""The labelled cases that a probe reads, and the same crops of them every time.

Shapes: n crops, C channels, L tokens of a crop, O organs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.crops import crop_around, read_padded
from nnunetv2_hiendmae.files import preprocessed_folder, read_json, read_plans
from nnunetv2_hiendmae.intensity import ChannelIntensity, Window, plan_intensities, to_canonical
from nnunetv2_hiendmae.patients import grouped, patients_of

CASES = 4
"""That the map is fitted to, and that it is judged on, at most; each is of another patient."""
CROPS = 8
"""Of a case, each around a voxel of one of its organs, in turn."""
FILLED = 0.1
"""Share of a token's voxels from which on an organ is in it: small organs, as a spinal cord, fill no token by half."""


@dataclass(frozen=True)
class Labelled:
    """What is needed of a labelled data set, as preprocessed by one plans configuration."""

    name: str
    folder: Path
    plans: str
    spacing: tuple[float, float, float]
    """In mm, in the axis order of the volumes."""
    channels: tuple[ChannelIntensity, ...]
    organs: dict[str, tuple[int, ...]]
    """The labels that make up each organ: several for a region."""
    ignored: int | None
    """Label of voxels that count for nothing."""
    fit: tuple[str, ...]
    judge: tuple[str, ...]

    @classmethod
    def open(cls, name_or_id: str, plans_name: str, configuration: str, window: Window) -> Labelled:
        """Find a data set and choose its cases, the same for every network.

        Raises:
            ValueError: it is not there, not CT, not 3D, or has no labels of at least two patients; says what to do.
        """
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # not above: it takes half a second

        base = preprocessed_folder(name_or_id)
        name = base.name
        planner = " -pl HiEndMAEPlanner" if plans_name == "HiEndMAEPlans" else ""
        preprocess = f"nnUNetv2_plan_and_preprocess -d {name} -c {configuration}{planner}"
        other = "or name other plans (-probe_plans; -p of hiendmae_benchmark)"
        plans = PlansManager(read_plans(base / f"{plans_name}.json", f"Run '{preprocess}', {other}."))
        if configuration not in plans.available_configurations:
            raise ValueError(f"{base / plans_name}.json has no configuration '{configuration}'. Run '{preprocess}'.")
        manager = plans.get_configuration(configuration)
        channels = plan_intensities(plans.plans, manager.configuration, window)
        if len(manager.spacing) != 3 or not all(channel.is_ct for channel in channels):
            raise ValueError(
                f"{name} cannot be probed: '{configuration}' of {plans_name} is not 3D CT in every channel."
            )
        labels = read_json(base / "dataset.json").get("labels", {})
        organs = {k: as_tuple(v) for k, v in labels.items() if k not in ("background", "ignore")}
        folder = base / manager.data_identifier
        cases = sorted(file.name.removesuffix("_seg.b2nd") for file in folder.glob("*_seg.b2nd"))
        patients = grouped(cases, patients_of(name))
        if not organs or len(patients) < 2:
            raise ValueError(
                f"{name} cannot be probed: {folder} holds labels of {len(patients)} patients and dataset.json names "
                f"{len(organs)} organs. Choose a labelled data set of at least two patients, or run '{preprocess}'."
            )
        chosen = [patients[i][0] for i in np.random.default_rng(0).permutation(len(patients))[: 2 * CASES]]
        half = len(chosen) // 2
        h, w, d = manager.spacing
        return cls(
            name, folder, plans_name, (float(h), float(w), float(d)), tuple(channels), organs, labels.get("ignore"),
            tuple(chosen[:half]), tuple(chosen[half:]),
        )  # fmt: skip

    def check(self, spacings: Iterable[Sequence[float]], in_channels: int) -> None:
        """``ValueError`` unless voxels and channels are those of a pre-training; no spacings: it does not say."""
        known = list(spacings)
        if known and not any(np.allclose(self.spacing, spacing, rtol=0.1) for spacing in known):
            wanted = " ".join(f"{mm:g}" for mm in known[0])
            raise ValueError(
                f"{self.plans} of {self.name} have voxels of {' × '.join(f'{mm:g}' for mm in self.spacing)} mm, the "
                f"pre-training had {' or '.join(' × '.join(f'{mm:g}' for mm in s) for s in known)} mm. Run "
                f"'nnUNetv2_plan_and_preprocess -d {self.name} -c 3d_fullres -overwrite_target_spacing {wanted} "
                f"-overwrite_plans_name NAME', and name those plans."
            )
        if len(self.channels) != in_channels:
            raise ValueError(f"{self.name} has {len(self.channels)} channels, the pre-training had {in_channels}.")


@dataclass(frozen=True)
class Crops:
    """Crops of some cases and what is in their tokens, kept in 8 bits."""

    images: np.ndarray
    """``(n, C, H, W, D)`` uint8: canonical · 255."""
    organs: np.ndarray
    """``(n · L, O)`` bool: the organ fills at least ``FILLED`` of the token."""
    known: np.ndarray
    """``(n · L,)`` bool: no voxel of the token is to be ignored."""


def read_crops(labelled: Labelled, cases: Sequence[str], size: Size, patch: Size) -> Crops:
    """``CROPS`` of each case; ``size`` is a multiple of ``patch``. ``ValueError`` if a file is damaged."""
    images, organs, known = [], [], []
    scale, shift, air = (
        np.array([getattr(c, name) for c in labelled.channels], np.float32).reshape(-1, 1, 1, 1)
        for name in ("scale", "shift", "stored_air")
    )
    for i, case in enumerate(cases):
        image, seg = read_case(labelled, case)
        for voxel in organ_voxels(seg[0], list(labelled.organs.values()), i):
            start = crop_around(voxel, seg.shape[1:], size)
            stored = read_padded(image, start, size, air).astype(np.float32)
            images.append(np.rint(255 * to_canonical(stored, scale, shift)).astype(np.uint8))
            tokens = voxels_of_tokens(read_padded(seg, start, size, np.zeros(1))[0], patch)
            shares = [np.isin(tokens, values).mean(1) for values in labelled.organs.values()]
            organs.append(np.stack(shares, 1) >= FILLED)
            known.append(~(tokens == labelled.ignored).any(1))
    return Crops(np.stack(images), np.concatenate(organs), np.concatenate(known))


def read_case(labelled: Labelled, case: str) -> tuple[Any, np.ndarray]:
    """Image ``(C, H, W, D)`` on disk, in its plan's intensities, and labels ``(1, H, W, D)``."""
    files = [labelled.folder / f"{case}{kind}.b2nd" for kind in ("", "_seg")]
    try:
        image, seg = (blosc2.open(str(f), mode="r", dparams={"nthreads": 1}, mmap_mode="r") for f in files)
        return image, seg[:]
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"Cannot read {files[0]} or its labels ({error}). Preprocess this case again.") from None


def organ_voxels(seg: np.ndarray, organs: list[tuple[int, ...]], turn: int) -> list[Size]:
    """``CROPS`` voxels of labels ``(H, W, D)``: of each organ there in turn, other ones first at another ``turn``."""
    rng = np.random.default_rng(turn)
    counts = np.bincount(seg.ravel().astype(np.int64) + 1)  # nnU-Net has -1 outside the body
    there = set((np.flatnonzero(counts) - 1).tolist())
    present = [values for values in organs if there & set(values)] or [tuple(there)]
    voxels = []
    for k in range(CROPS):
        places = np.flatnonzero(np.isin(seg, present[(turn * CROPS + k) % len(present)]))
        h, w, d = np.unravel_index(rng.choice(places), seg.shape)
        voxels.append((int(h), int(w), int(d)))
    return voxels


def voxels_of_tokens(volume: np.ndarray, patch: Size) -> np.ndarray:
    """``(H, W, D)`` to ``(L, ph · pw · pd)``, in the order of an encoder's tokens."""
    split = [n for edge, p in zip(volume.shape, patch, strict=True) for n in (edge // p, p)]
    return volume.reshape(split).transpose(0, 2, 4, 1, 3, 5).reshape(-1, int(np.prod(patch)))


def as_tuple(label: int | Sequence[int]) -> tuple[int, ...]:
    """The labels of an organ."""
    return (label,) if isinstance(label, int) else tuple(label)
