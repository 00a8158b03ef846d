"""The endless, reproducible stream of training crops.

Crop number i of a run depends on the seed and i alone: not on the worker, the rank, or an interruption. Step s takes
crops ``s·batch_size … (s+1)·batch_size - 1``, rank r of n the r-th of n equal parts of them; so a run's position is its
step, and there is no generator state to save.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pretraining.augmentation import Augmentation, orient_crops, rotation_plane
from pretraining.config import RunConfig
from pretraining.corpus import Corpus, choose_start
from pretraining.masking import random_shuffle
from pretraining.processes import end_with_the_parent

# What a generator is for; keeps streams apart that share a seed.
ORDER, CROP, HELD_OUT, SPLIT = range(4)
GRACE_S = 900
"""Between SIGTERM and a loader process' end: the trainer needs its batches until it has written its checkpoint."""

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

    def case_of(self, visit: int) -> int:
        """The case of a visit: every pass over the cases has its own random order."""
        epoch, position = divmod(visit, len(self.cases))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.config.seed, ORDER, self.purpose, epoch))
            self._order = epoch, rng.permutation(self.cases)
        return int(self._order[1][position])


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: images as torch does it, in shared memory if need be; the small rest at once, which is much faster."""
    rest = {name: torch.from_numpy(np.array([s[name] for s in samples])) for name in samples[0] if name != "image"}
    return {**rest, "image": default_collate([s["image"] for s in samples]), "jitter": rest["jitter"].float()}


def canonical_crops(batch: dict[str, Any], device: torch.device) -> Tensor:
    """What the model sees: ``(B, C, H, W, D)`` float32 in [0, 1], but for augmentation, which is not clipped.

    The compact stored dtype is what travels to the device.
    """
    image = batch["image"].to(device, non_blocking=True)
    image = orient_crops(image, batch["exchange"], batch["flips"]).float()
    scale, shift = batch["intensity"].to(device, non_blocking=True)[..., None, None, None].unbind(2)  # (B, C, 1, 1, 1)
    gain, offset = batch["jitter"].to(device, non_blocking=True)[..., None, None, None, None].unbind(1)
    return (image * scale).add_(shift).clamp_(0, 1).mul_(gain).add_(offset)  # the batch itself stays as it is


def split_cases(corpus: Corpus, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out cases: about one in twenty is held out, at least 1 and at most 8.

    A corpus of one case is both: its held-out loss is then one of other crops, not of another patient.
    """
    order = np.random.default_rng((seed, SPLIT)).permutation(len(corpus)).tolist()
    if len(order) == 1:
        return order, order
    held_out = min(max(round(len(order) / 20), 1), 8)
    return sorted(order[held_out:]), sorted(order[:held_out])


def steps_of_epochs(epochs: float, num_cases: int, batch_size: int, crops_per_case: int) -> int:
    """Optimizer steps of passes over the cases with ``crops_per_case`` crops each."""
    return max(1, round(epochs * num_cases * crops_per_case / batch_size))


@dataclass(frozen=True)
class MicroBatches:
    """Batch sampler: the crop numbers of every remaining step, this rank's part, in ``accumulate`` micro-batches."""

    start: int
    stop: int
    batch_size: int
    """Crops a step, over all ranks and micro-batches."""
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // (self.world_size * self.accumulate)
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * size * self.accumulate
            for i in range(self.accumulate):
                yield list(range(first + i * size, first + (i + 1) * size))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate


def train_loader(stream: CropStream, sampler: MicroBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches in the sampler's order."""
    return DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,  # also from Python 3.14 on
        worker_init_fn=follow_the_trainer,
    )


def follow_the_trainer(_: int) -> None:
    """A loader process ends when its trainer does, not by the signals that reach both.

    A terminal's Ctrl-C and a scheduler's signals go to all processes; the trainer finishes its step and stops.
    """
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    # torch's own watch begins too late to see a trainer that ended while this process was being started.
    end_with_the_parent()


def held_out_batches(stream: CropStream, num_crops: int, batch_size: int) -> list[dict[str, Any]]:
    """Fixed crops of the held-out cases, the same at each validation."""
    chunks = [range(i, min(i + batch_size, num_crops)) for i in range(0, num_crops, batch_size)]
    return [collate([stream[i] for i in chunk]) for chunk in chunks]
