"""The endless, reproducible stream of training crops.

Crop number i of a run depends on the seed and i alone: not on the worker, the rank, or an interruption. Step s takes
crops ``s·batch_size … (s+1)·batch_size - 1``, rank r of n the r-th of n equal parts of them; so a run's position is its
step, and there is no generator state to save.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nnunetv2_hiendmae.patients import grouped, patients_of
from pretraining.config import RunConfig
from pretraining.data.augmentation import Augmentation, orient_crops, rotation_plane
from pretraining.data.corpus import Corpus, choose_start
from pretraining.device import on_device
from pretraining.masking import canonical_values, random_shuffle

# What a generator is for; keeps streams apart that share a seed.
ORDER, CROP, HELD_OUT, SPLIT = range(4)

Batch = dict[str, Tensor]


@dataclass
class CropStream(Dataset):
    """Map from a crop's number to the crop."""

    corpus: Corpus
    config: RunConfig
    cases: list[int]
    """Cases to draw from."""
    purpose: int = CROP
    _order: tuple[int, np.ndarray] = field(default=(-1, np.empty(0)), repr=False)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One crop, as stored: ``canonical_crops`` makes a batch of them what the model sees.

        ``image`` (C, *img_size) in the corpus's dtype, a view of the file where possible: collating is the one copy;
        ``intensity`` (C, 2) float32, its map to the canonical domain; ``exchange``, ``flips`` (3,) and ``jitter``
        (2,), its augmentation; ``ids_shuffle`` (L,) int64; ``case`` and ``start`` tell where it is from.
        """
        config, model = self.config, self.config.model
        rng = np.random.default_rng((config.seed, self.purpose, index))
        case = self.case_of(index // config.crops_per_case)
        augment = config.augment and self.purpose == CROP
        draw = Augmentation.draw(rng, rotation_plane(self.corpus.dataset(case).spacing)) if augment else Augmentation()
        size = draw.size_to_read(model.img_size)
        start = choose_start(self.corpus, rng, case, size, config.body_fraction)
        crop, exchange = draw.exchange_in_loader(self.corpus.read(case, start, size))
        return {
            "image": torch.from_numpy(crop),
            "intensity": self.corpus.intensity(case),
            "exchange": exchange,
            "flips": draw.flips_afterwards,
            "jitter": (draw.scale, draw.shift),
            "ids_shuffle": random_shuffle(rng, model.num_tokens),
            "case": case,
            "start": start,
        }

    @property
    def stored(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape ``(C, H, W, D)`` and dtype of every crop."""
        return (self.corpus.in_channels, *self.config.model.img_size), self.corpus.dtype

    def case_of(self, visit: int) -> int:
        """The case of a visit: every pass over the cases has its own random order."""
        epoch, position = divmod(visit, len(self.cases))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.config.seed, ORDER, self.purpose, epoch))
            self._order = epoch, rng.permutation(self.cases)
        return int(self._order[1][position])


def collate(samples: list[dict[str, Any]]) -> Batch:
    """A batch, in memory of its own."""
    numbers = {name: torch.from_numpy(values) for name, values in numbers_of(samples).items()}
    return {**numbers, "image": torch.stack([s["image"] for s in samples])}


def numbers_of(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """All of a batch but its images."""
    numbers = {name: np.array([s[name] for s in samples]) for name in samples[0] if name != "image"}
    return {**numbers, "jitter": numbers["jitter"].astype(np.float32)}


def stored_crops(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch on the device, as ``HiEndMAE.forward`` takes it; nothing is waited for.

    Returns:
        Voxels ``(B, C, H, W, D)`` as stored, flipped and rotated, and ``intensity`` ``(B, C, 4)``: scale and shift to
        the canonical domain, gain and offset of the augmentation.
    """
    image = orient_crops(on_device(batch["image"], device), batch["exchange"], batch["flips"])
    jitter = batch["jitter"][:, None].expand_as(batch["intensity"])
    intensity = torch.cat([batch["intensity"], jitter], dim=2)
    return image, on_device(intensity, device)


def canonical_crops(batch: Batch, device: torch.device) -> Tensor:
    """What the model sees: ``(B, C, H, W, D)`` float32 in [0, 1], but for augmentation, which is not clipped."""
    image, intensity = stored_crops(batch, device)
    return canonical_values(image, *intensity[..., None, None, None].unbind(2))


def split_cases(corpus: Corpus, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out cases: about one in twenty is held out, at least 1 and at most 8.

    Cases of one patient (patients.csv) are on the same side: the counts are of patients. A corpus of one patient is
    both: its held-out loss is then one of other crops, not of another patient.
    """
    patients = cases_by_patient(corpus)
    order = np.random.default_rng((seed, SPLIT)).permutation(len(patients)).tolist()
    split = min(max(round(len(order) / 20), 1), 8) if len(order) > 1 else 0
    held_out, training = ([case for p in part for case in patients[p]] for part in (order[:split], order[split:]))
    return sorted(training), sorted(held_out or training)


def cases_by_patient(corpus: Corpus) -> list[list[int]]:
    """Cases of each patient; where no patients.csv says otherwise, each case is a patient."""
    names = {corpus.name(i): i for i in range(len(corpus))}
    tables = {d.name: patients_of(d.name) for d in corpus.datasets}
    table = {f"{d}/{case}": f"{d}/{patient}" for d, rows in tables.items() for case, patient in rows.items()}
    return [[names[name] for name in group] for group in grouped(names, table)]


def steps_of_epochs(epochs: float, num_cases: int, batch_size: int, crops_per_case: int) -> int:
    """Optimizer steps of passes over the cases with ``crops_per_case`` crops each."""
    return max(1, round(epochs * num_cases * crops_per_case / batch_size))


def held_out_batches(stream: CropStream, num_crops: int, batch_size: int) -> list[dict[str, Any]]:
    """Fixed crops of the held-out cases, the same at each validation."""
    chunks = [range(i, min(i + batch_size, num_crops)) for i in range(0, num_crops, batch_size)]
    return [collate([stream[i] for i in chunk]) for chunk in chunks]
