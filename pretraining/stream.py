"""The endless, reproducible stream of training crops.

Crop number i of a run depends on the seed and i alone: not on the worker, the rank, or an interruption. Step s takes
crops ``s·batch_size … (s+1)·batch_size - 1``; so a run's position is its step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretraining.augmentation import Augmentation, rotation_plane
from pretraining.config import RunConfig
from pretraining.corpus import Corpus
from pretraining.masking import random_shuffle

# What a generator is for; keeps streams apart that share a seed.
ORDER, CROP, HELD_OUT, SPLIT = range(4)


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
        """``image`` (C, *img_size) float32, ``ids_shuffle`` (L,) int64, and ``case``, ``start`` to tell where from."""
        config, model = self.config, self.config.model
        rng = np.random.default_rng((config.seed, self.purpose, index))
        case = self.case_of(index // config.crops_per_case)
        spacing = self.corpus.cases[case][0].spacing
        augment = config.augment and self.purpose == CROP
        draw = Augmentation.draw(rng, rotation_plane(spacing)) if augment else Augmentation()
        size = draw.size_to_read(model.img_size)
        start = self.corpus.choose_start(rng, case, size, config.body_fraction)
        image = draw.apply(self.corpus.read(case, start, size))
        return {
            "image": torch.from_numpy(image),
            "ids_shuffle": random_shuffle(rng, model.num_tokens),
            "case": case,
            "start": torch.tensor(start),
        }

    def case_of(self, visit: int) -> int:
        """The case of a visit: every pass over the cases has its own random order."""
        epoch, position = divmod(visit, len(self.cases))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.config.seed, ORDER, self.purpose, epoch))
            self._order = epoch, rng.permutation(self.cases)
        return int(self._order[1][position])


def split_cases(corpus: Corpus, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out cases: about one in twenty is held out, at least 1 and at most 8.

    A corpus of one case is both: its held-out loss is then one of other crops, not of another patient.
    """
    order = np.random.default_rng((seed, SPLIT)).permutation(len(corpus.cases)).tolist()
    if len(order) == 1:
        return order, order
    held_out = min(max(round(len(order) / 20), 1), 8)
    return sorted(order[held_out:]), sorted(order[:held_out])


def steps_of_epochs(epochs: float, num_cases: int, batch_size: int, crops_per_case: int) -> int:
    """Optimizer steps of passes over the cases with ``crops_per_case`` crops each."""
    return max(1, round(epochs * num_cases * crops_per_case / batch_size))


@dataclass(frozen=True)
class Steps:
    """Batch sampler: the crop numbers of every remaining step."""

    start: int
    stop: int
    batch_size: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield list(range(step * self.batch_size, (step + 1) * self.batch_size))

    def __len__(self) -> int:
        return self.stop - self.start


def train_loader(stream: CropStream, start_step: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches of the steps from ``start_step`` on."""
    return DataLoader(
        stream,
        batch_sampler=Steps(start_step, stream.config.steps, stream.config.batch_size),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )


def held_out_batches(stream: CropStream, num_crops: int) -> list[dict[str, Any]]:
    """Fixed crops of the held-out cases, the same at each validation, in batches of the training size."""
    size = stream.config.batch_size
    chunks = [range(i, min(i + size, num_crops)) for i in range(0, num_crops, size)]
    return [torch.utils.data.default_collate([stream[i] for i in chunk]) for chunk in chunks]
