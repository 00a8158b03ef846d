"""Batches of the stream for training, made by loader processes in memory that is used again and again.

A process fills slots of shared memory with chunks of a few crops; a thread of the trainer puts them together into the
next batch, in pinned memory, while the device computes. Nothing is allocated for a batch, and what is in flight is
bounded: ``AHEAD`` chunks of a process, and the batches of two steps and one more.
"""

from __future__ import annotations

import itertools
import mmap
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretraining.data.stream import Batch, CropStream, numbers_of
from pretraining.processes import end_with_the_parent

CHUNK_BYTES = 8 * 2**20
"""Of voxels; a crop that is larger is a chunk of its own."""
AHEAD = 4
"""Chunks that each loader process works ahead."""
GRACE_S = 900
"""Between SIGTERM and a loader process' end: the trainer needs its batches until it has written its checkpoint."""


@dataclass(frozen=True)
class MicroBatches:
    """The crop numbers of every remaining step, this rank's part, in ``accumulate`` micro-batches."""

    start: int
    stop: int
    batch_size: int
    """Crops a step, over all ranks and micro-batches."""
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Crops of a micro-batch."""
        return self.batch_size // (self.world_size * self.accumulate)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * self.size * self.accumulate
            for i in range(self.accumulate):
                yield list(range(first + i * self.size, first + (i + 1) * self.size))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate


@dataclass
class Chunks(Dataset):
    """What a loader process does: crops into a slot, the small rest through the pipe."""

    stream: CropStream
    slots: Tensor
    """``(slots, crops, C, H, W, D)``, shared by the processes."""

    def __getitem__(self, task: tuple[int, list[int]]) -> tuple[int, dict[str, np.ndarray]]:
        slot, numbers = task
        samples = []
        for place, number in zip(self.slots[slot], numbers, strict=False):  # the last chunk of a batch may be smaller
            sample = self.stream[number]
            place.copy_(sample.pop("image"))
            samples.append(sample)
        return slot, numbers_of(samples)


@dataclass
class Tasks:
    """Chunks of micro-batches, each with a slot. A slot comes round when what was in it has been taken out."""

    batches: MicroBatches
    slots: int
    crops: int

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        chunks = (batch[i : i + self.crops] for batch in self.batches for i in range(0, len(batch), self.crops))
        return zip(itertools.cycle(range(self.slots)), chunks, strict=False)


def train_loader(stream: CropStream, sampler: MicroBatches, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches in the sampler's order. One is overwritten when ``2 · accumulate`` further ones have been asked for."""
    shape, dtype = stream.stored
    crops = min(max(CHUNK_BYTES // (int(np.prod(shape)) * dtype.itemsize), 1), sampler.size)
    # A task is given out when that of AHEAD · num_workers earlier is handed over; the one before that has been copied.
    slots = shared_memory((AHEAD * num_workers + 1, crops, *shape), dtype)
    loader = DataLoader(
        Chunks(stream, slots),
        batch_size=None,
        sampler=Tasks(sampler, len(slots), crops),
        collate_fn=as_it_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        prefetch_factor=AHEAD if num_workers else None,
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,  # also from Python 3.14 on
        worker_init_fn=follow_the_trainer,
    )
    # The step at hand and the one before it, whose crops a report may need, and the batch that is being made.
    shape = (2 * sampler.accumulate + 1, sampler.size, *shape)
    batches = put_together(iter(loader), slots, torch.empty(shape, dtype=slots.dtype, pin_memory=pin_memory))
    return ahead(batches) if num_workers else batches


def put_together(
    chunks: Iterator[tuple[int, dict[str, np.ndarray]]], slots: Tensor, buffers: Tensor
) -> Iterator[Batch]:
    """Chunks in turn to batches as ``collate`` makes them; their images are ``buffers``, in turn."""
    for image in itertools.cycle(buffers):
        filled, parts = 0, []
        while filled < len(image):
            slot, numbers = next(chunks, (None, {}))
            if slot is None:
                return
            count = len(numbers["case"])
            image[filled : filled + count].copy_(slots[slot, :count])
            filled += count
            parts.append(numbers)
        numbers = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        yield {**{name: torch.from_numpy(values) for name, values in numbers.items()}, "image": image}


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = thread.submit(next, batches, None)
            yield batch


def shared_memory(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """Memory that loader processes write and this one reads.

    Forked processes inherit it. It is no file in /dev/shm, of which containers have 64 MB.
    """
    example = torch.from_numpy(np.empty(0, dtype))
    if sys.platform != "linux":
        return torch.empty(shape, dtype=example.dtype).share_memory_()
    memory = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=example.dtype).view(shape)


def as_it_is(chunk: tuple[int, dict[str, np.ndarray]]) -> tuple[int, dict[str, np.ndarray]]:
    """Arrays go through the pipe; torch would put each tensor into shared memory of its own."""
    return chunk


def follow_the_trainer(_: int) -> None:
    """A loader process ends when its trainer does, not by the signals that reach both.

    A terminal's Ctrl-C and a scheduler's signals go to all processes; the trainer finishes its step and stops.
    """
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    # torch's own watch begins too late to see a trainer that ended while this process was being started.
    end_with_the_parent()
