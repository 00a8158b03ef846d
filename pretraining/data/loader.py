"""Batches of the stream for training, made by loader processes in memory that is used again and again.

A process writes chunks of a few crops to their places in a batch, in shared memory that a GPU copies from; the trainer
only puts their numbers together. Nothing is allocated or copied for a batch, and what is in flight is bounded: the
batches of two steps, and those of the chunks that are worked ahead, which are a step, or ``AHEAD`` of each process.
"""

from __future__ import annotations

import atexit
import itertools
import math
import mmap
import multiprocessing
import signal
import sys
from collections.abc import Iterator
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
"""Chunks that each loader process works ahead, or more, so that all of them work a step ahead."""
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
    """What a loader process does: crops into their places in a batch, the small rest through the pipe."""

    stream: CropStream
    buffers: Tensor
    """``(buffers, batch, C, H, W, D)``, shared by the processes."""

    def __getitem__(self, task: tuple[int, int, list[int]]) -> dict[str, np.ndarray]:
        buffer, first, numbers = task
        samples = []
        for place, number in zip(self.buffers[buffer, first : first + len(numbers)], numbers, strict=True):
            sample = self.stream[number]
            place.copy_(sample.pop("image"))
            samples.append(sample)
        return numbers_of(samples)


@dataclass
class Tasks:
    """Chunks of micro-batches, each with its place. A buffer comes round when what was in it has been used."""

    batches: MicroBatches
    buffers: int
    crops: int

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        for buffer, batch in zip(itertools.cycle(range(self.buffers)), self.batches, strict=False):
            for first in range(0, len(batch), self.crops):
                yield buffer, first, batch[first : first + self.crops]


def train_loader(stream: CropStream, sampler: MicroBatches, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches in the sampler's order. One is overwritten when ``2 · accumulate`` further ones have been asked for."""
    shape, dtype = stream.stored
    crops = min(max(CHUNK_BYTES // (int(np.prod(shape)) * dtype.itemsize), 1), sampler.size)
    chunks = math.ceil(sampler.size / crops)
    each = max(AHEAD, math.ceil(sampler.accumulate * chunks / max(num_workers, 1)))
    # The step at hand and the one before it, whose crops a report may need; and the batches of the chunks ahead: one of
    # these is begun whenever one is handed over.
    count = 2 * sampler.accumulate + math.ceil(each * num_workers / chunks)
    buffers = memory((count, sampler.size, *shape), dtype, num_workers > 0, pin_memory)
    loader = DataLoader(
        Chunks(stream, buffers),
        batch_size=None,
        sampler=Tasks(sampler, count, crops),
        collate_fn=as_it_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        prefetch_factor=each if num_workers else None,
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,  # also from Python 3.14 on
        worker_init_fn=follow_the_trainer,
    )
    atexit.register(end_loader_processes)
    batches = put_together(iter(loader), buffers, chunks)
    return page_locked(batches, buffers) if pin_memory and num_workers else batches


def put_together(chunks: Iterator[dict[str, np.ndarray]], buffers: Tensor, count: int) -> Iterator[Batch]:
    """Batches as ``collate`` makes them, of ``count`` chunks each, whose images are in ``buffers``, in turn."""
    for image in itertools.cycle(buffers):
        parts = list(itertools.islice(chunks, count))
        if not parts:
            return
        numbers = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        yield {**{name: torch.from_numpy(values) for name, values in numbers.items()}, "image": image}


def page_locked(batches: Iterator[Batch], buffers: Tensor) -> Iterator[Batch]:
    """The same batches; until they are given up, a GPU copies from their memory while the trainer goes on.

    As torch does with what it shares and pins (``torch.distributed._state_dict_utils``). Not before the processes have
    begun: the driver may keep what is locked from those that are forked later.

    Raises:
        RuntimeError: the driver cannot lock it.
    """
    cudart, place = torch.cuda.cudart(), buffers.data_ptr()
    code = int(cudart.cudaHostRegister(place, buffers.numel() * buffers.element_size(), 0))
    if code:
        raise RuntimeError(f"CUDA cannot page-lock the memory of the loader processes (error {code}): -num_workers 0")
    try:
        yield from batches
    finally:
        cudart.cudaHostUnregister(place)


def memory(shape: tuple[int, ...], dtype: np.dtype, shared: bool, pin_memory: bool) -> Tensor:
    """Memory that this process reads, and that loader processes write if it is ``shared``.

    Forked processes inherit it. It is no file in /dev/shm, of which containers have 64 MB.
    """
    example = torch.from_numpy(np.empty(0, dtype))
    if not shared:
        return torch.empty(shape, dtype=example.dtype, pin_memory=pin_memory)
    if sys.platform != "linux":
        return torch.empty(shape, dtype=example.dtype).share_memory_()
    return torch.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize), dtype=example.dtype).view(shape)


def as_it_is(chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays go through the pipe; torch would put each tensor into shared memory of its own."""
    return chunk


def end_loader_processes() -> None:
    """At the end of a process that still has them, after an error: Python would send SIGTERM and wait for GRACE_S."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a loader process is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def follow_the_trainer(_: int) -> None:
    """A loader process ends when its trainer does, not by the signals that reach both.

    A terminal's Ctrl-C and a scheduler's signals go to all processes; the trainer finishes its step and stops.
    """
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    # torch's own watch begins too late to see a trainer that ended while this process was being started.
    end_with_the_parent()
