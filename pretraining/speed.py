"""Measurements of loading, of the training step, and of training, through the code that training runs."""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_hiendmae.checks import MAX_COUNT
from pretraining.config import RunConfig, Runtime
from pretraining.data.b2nd import PreprocessedCorpus
from pretraining.data.corpus import Corpus
from pretraining.data.stream import Batch, CropStream, canonical_crops, collate, split_cases
from pretraining.device import Fetch, Reading, synchronize
from pretraining.flops import flops_per_crop
from pretraining.masking import patchify
from pretraining.step import TrainState, agree, backward, prepare_network, update
from pretraining.train import train_batches

WARM_UP, AT_LEAST = 2, 3
"""Steps, or batches, before a measurement and in it."""
WAITING = 0.05
"""Share of the time above which loading is the limit."""
CONSTANT = 1e-3
"""Standard deviation in canonical units (0.4 HU); its square is the 1e-6 that guards the target's variance."""


def loading(corpus: Corpus, config: RunConfig, runtime: Runtime, device: torch.device, seconds: float) -> float:
    """Crops/s of the loader alone: the run's batches, through its processes, into the memory that feeds the device."""
    batches = endless_batches(corpus, config, runtime, device)
    for _ in range(WARM_UP * runtime.accumulate):
        next(batches)
    started, crops = time.perf_counter(), 0
    for taken in itertools.count(1):
        crops += len(next(batches)["case"])
        if taken >= AT_LEAST and time.perf_counter() - started >= seconds:
            return crops / (time.perf_counter() - started)
    raise AssertionError


def nnunet_read(corpus: PreprocessedCorpus, config: RunConfig, seconds: float) -> float:
    """Crops/s of one process that opens cases as nnU-Net's loader does and copies a random crop of each, no more."""
    folders = {d.name: nnUNetDatasetBlosc2(str(d.folder)) for d in corpus.sources}
    size, rng, crops = config.model.img_size, np.random.default_rng(0), 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        source, case = corpus.cases[int(rng.integers(len(corpus)))]
        data = folders[source.name].load_case(case)[0]
        start = [int(rng.integers(0, max(edge - n, 0) + 1)) for edge, n in zip(data.shape[1:], size, strict=True)]
        _ = data[(slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]
        crops += 1
    return crops / (time.perf_counter() - started)


def constant_share(corpus: Corpus, config: RunConfig, crops: int = 200) -> float:
    """Share of the stream's patches that are constant, but for resampling ripple: their target is 0 or noise."""
    stream = CropStream(corpus, config, list(range(len(corpus))))
    constant = 0.0
    for i in range(crops):
        patches = patchify(canonical_crops(collate([stream[i]]), torch.device("cpu")), config.model.patch_size)
        constant += float((patches.std(-1) < CONSTANT).float().mean())
    return constant / crops


def step(config: RunConfig, runtime: Runtime, device: torch.device, seconds: float) -> dict[str, float]:
    """Crops/s of the training step alone, on one batch that is copied to the device each time."""
    state = TrainState.create(config, device)
    network = prepare_network(state.model, runtime, device)
    batch = random_batch(config, runtime.micro_batch(config.batch_size, 1))
    if device.type == "cuda":  # as the loader's are
        batch = {name: values.contiguous().pin_memory() for name, values in batch.items()}
    times: list[float] = []
    while sum(times[WARM_UP:]) < seconds or len(times) < WARM_UP + AT_LEAST:
        started = time.perf_counter()
        loss, grad_norm = backward(state, network, [batch] * runtime.accumulate, config, device)
        update(state, 0.0, agree(state, loss, grad_norm, False))
        synchronize(device)
        times.append(time.perf_counter() - started)
    rate, flops = config.batch_size / statistics.median(times[WARM_UP:]), flops_per_crop(config.model)
    return {"crops_per_s": rate, "gflop_per_crop": flops / 1e9, "gflop_per_s": rate * flops / 1e9}


def training(
    corpus: Corpus, config: RunConfig, runtime: Runtime, device: torch.device, seconds: float
) -> dict[str, float]:
    """Steps of a run as ``train`` takes them, on this rank: loader, copies, step, and numbers read one step late.

    Returns:
        ``crops_per_s`` of all ranks; ``data_wait``, the share of the time in which the device had nothing to do for
        want of data; ``memory_gib``, the most that the device, or this process, had in use; ``checkpoint_gib``.
    """
    state = TrainState.create(config, device)
    batches = endless_batches(corpus, config, runtime, device)
    network = prepare_network(state.model, runtime, device)
    if device.type == "cuda":  # what was measured before is not part of it
        torch.cuda.reset_peak_memory_stats(device)
    queued: Reading | None = None
    started, fetches = 0.0, list[Fetch]()
    for taken in itertools.count(-WARM_UP):
        # Every rank leaves at the same step: the time is in what they share.
        over = taken >= AT_LEAST and time.perf_counter() - started >= seconds
        if taken == 0 and queued is not None:
            queued.get()
            started, fetches = time.perf_counter(), []
        asked = time.perf_counter()
        step_batches = [next(batches) for _ in range(runtime.accumulate)]
        fetches.append(Fetch(time.perf_counter() - asked, queued, device))
        loss, grad_norm = backward(state, network, step_batches, config, device)
        shared = agree(state, loss, grad_norm, over)
        update(state, 0.0, shared)
        if queued is not None and queued.get()[2] > 0:
            break
        queued = Reading(shared)
    steps, _ = taken + 1, Reading(shared).get()
    elapsed = time.perf_counter() - started
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    return {
        "crops_per_s": steps * config.batch_size / elapsed,
        "data_wait": sum(fetch.idle() for fetch in fetches) / elapsed,
        "memory_gib": used / 2**30,
        "checkpoint_gib": 3 * sum(p.numel() * p.element_size() for p in state.model.parameters()) / 2**30,
    }


def endless_batches(corpus: Corpus, config: RunConfig, runtime: Runtime, device: torch.device) -> Iterator[Batch]:
    """What a run trains on, however long it is measured."""
    stream = CropStream(corpus, config, split_cases(corpus, config.seed)[0])
    return train_batches(replace(config, steps=MAX_COUNT), runtime, stream, 0, device)


def random_batch(config: RunConfig, size: int) -> Batch:
    """A batch as the loader gives it, of noise."""
    model, generator = config.model, torch.Generator().manual_seed(0)
    shape = (size, model.in_channels, *model.img_size)
    return {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "intensity": torch.tensor((1 / 255, 0.0)).expand(size, model.in_channels, 2),
        "exchange": torch.zeros(size, dtype=torch.int64),
        "flips": torch.rand(size, 3, generator=generator) < 0.5,
        "jitter": torch.tensor((1.0, 0.0)).expand(size, 2),
        "ids_shuffle": torch.rand(size, model.num_tokens, generator=generator).argsort(1),
    }


def estimate(config: RunConfig, runtime: Runtime, corpus: Corpus, device: torch.device, seconds: float) -> list[str]:
    """How long a run will take, what it needs, and what to change, from its first steps. Nothing is written."""
    found = training(corpus, config, runtime, device, seconds)
    hours = config.steps * config.batch_size / found["crops_per_s"] / 3600
    copies = runtime.keep_checkpoints + 1  # one is written while the others stay
    lines = [
        f"{found['crops_per_s']:.4g} crops/s: {config.steps} steps of {config.batch_size} take {hours:.3g} hours, "
        f"without validations",
        f"memory of a process on {device.type}: {found['memory_gib']:.2f} GiB{of_all(device)}",
        f"checkpoints: {copies} × {found['checkpoint_gib']:.2f} GiB, one every {runtime.checkpoint_minutes:g} minutes",
        f"waiting for data: {found['data_wait']:.0%} of the time",
    ]
    if found["data_wait"] <= WAITING:
        return [*lines, "nothing to change in loading: the step is the limit"]
    pack = "" if config.packed_bits else ", or pack the data (hiendmae_pack)"
    return [*lines, f"loading is the limit: use more loader processes (-num_workers {runtime.num_workers} now){pack}"]


def of_all(device: torch.device) -> str:
    """Memory that the device has."""
    if device.type != "cuda":
        return ""
    return f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} (less: -accumulate)"


def peak_resident() -> int:
    """Most bytes of memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(figures: dict[str, Any]) -> str:
    """The figures as text, each with what was measured."""
    size, processes = figures["config"]["batch_size"], figures["num_workers"]
    lines = [f"Loading alone, batches of {size} crops, {processes} loader processes:"]
    lines += [f"  {name:<16} {rate:9.1f} crops/s" for name, rate in figures["loading"].items()]
    if "nnunet_read" in figures:
        lines.append(f"  (nnU-Net's read of a random crop alone, one process: {figures['nnunet_read']:.1f} crops/s)")
    lines += [f"Constant patches in {n}: {share:.1%}" for n, share in figures["constant_patches"].items()]
    measured, peak = figures["step"], figures["matrix_product_gflop_per_s"]
    lines.append(
        f"Step alone: {measured['crops_per_s']:.2f} crops/s, {measured['gflop_per_s'] / peak:.0%} of a matrix product "
        f"({measured['gflop_per_s']:.0f} of {peak:.0f} GFLOP/s, {measured['gflop_per_crop']:.1f} GFLOP a crop)"
    )
    for name, found in figures["training"].items():
        limit = "the step" if found["data_wait"] <= WAITING else "loading (more -num_workers, or hiendmae_pack)"
        lines.append(
            f"Training, {name}: {found['crops_per_s']:.2f} crops/s, waiting for data {found['data_wait']:.0%}, "
            f"{found['memory_gib']:.2f} GiB, limited by {limit}; "
            f"100,000 steps: {100_000 * size / found['crops_per_s'] / 3600:.1f} hours"
        )
    return "\n".join(lines)
