"""Measurements of the data path, the training step, and both together, on this machine."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch.utils.flop_counter import FlopCounterMode

from pretraining.config import BYTES_OF_STATE, RunConfig, Runtime
from pretraining.corpus import Corpus
from pretraining.masking import patchify
from pretraining.model import HiEndMAE
from pretraining.preprocessed import PreprocessedCorpus
from pretraining.stream import CropStream, MicroBatches, canonical_crops, collate, split_cases, train_loader
from pretraining.train import TrainState, backward, prepare_network, update

ROUNDS, BATCH = 5, 8
CONSTANT = 1e-3
"""Standard deviation in canonical units (0.4 HU); its square is the 1e-6 that guards the target's variance."""


def data_path(corpora: dict[str, Corpus], config: RunConfig, seconds: float) -> dict[str, float]:
    """Crops/s of one process, taken in turns; the median of the rounds.

    ``nnU-Net .b2nd read`` opens a case as nnU-Net's loader does and copies a random crop of its image, no more;
    the others are what a loader process does for a batch: choice of place, read, mask, collation.
    """
    takers: dict[str, Callable[[int], Any]] = {}
    for name, corpus in corpora.items():
        if isinstance(corpus, PreprocessedCorpus):
            takers["nnU-Net .b2nd read"] = nnunet_reader(corpus, config)
        takers[name] = batcher(CropStream(corpus, config, split_cases(corpus, config.seed)[0]))
    rates: dict[str, list[float]] = {name: [] for name in takers}
    counts = dict.fromkeys(takers, 0)
    for taker in takers.values():  # body maps are made, files come into the page cache
        for i in range(16):
            taker(i)
    for _ in range(ROUNDS):
        for name, taker in takers.items():
            first, started = counts[name], time.perf_counter()
            while time.perf_counter() - started < seconds / ROUNDS:
                taker(counts[name])
                counts[name] += 1
            rates[name].append((counts[name] - first) * BATCH / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def batcher(stream: CropStream) -> Callable[[int], Any]:
    """Batches as a loader process makes them."""
    return lambda i: collate([stream[i * BATCH + k] for k in range(BATCH)])


def nnunet_reader(corpus: PreprocessedCorpus, config: RunConfig) -> Callable[[int], list[np.ndarray]]:
    """Random crops through nnU-Net's own data set class, as many as a batch has."""
    folders = {d.name: nnUNetDatasetBlosc2(str(d.folder)) for d in corpus.sources}
    size, rng = config.model.img_size, np.random.default_rng(0)

    def read() -> np.ndarray:
        source, case = corpus.cases[int(rng.integers(len(corpus)))]
        data = folders[source.name].load_case(case)[0]
        start = [int(rng.integers(0, max(edge - n, 0) + 1)) for edge, n in zip(data.shape[1:], size, strict=True)]
        return data[(slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]

    return lambda _: [read() for _ in range(BATCH)]


def constant_share(corpus: Corpus, config: RunConfig, crops: int = 200) -> float:
    """Share of the stream's patches that are constant, but for resampling ripple: their target is 0 or noise."""
    stream = CropStream(corpus, config, list(range(len(corpus))))
    constant = 0.0
    for i in range(crops):
        patches = patchify(canonical_crops(collate([stream[i]]), torch.device("cpu")), config.model.patch_size)
        constant += float((patches.std(-1) < CONSTANT).float().mean())
    return constant / crops


def step(config: RunConfig, runtime: Runtime, device: torch.device, seconds: float) -> dict[str, float]:
    """Crops/s of the training step on one batch that is on the device already, and its memory."""
    before = resident()
    state = TrainState.create(config, device)
    network = prepare_network(state.model, runtime, device)
    size = runtime.micro_batch(config.batch_size, 1)
    batches = [random_batch(config, size) for _ in range(runtime.accumulate)]
    parameters = sum(p.numel() for p in state.model.parameters())

    def once() -> None:
        backward(state, network, batches, config, device)
        update(state, config.base_lr, config)
        synchronize(device)

    for _ in range(2):
        once()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        started = time.perf_counter()
        once()
        times.append(time.perf_counter() - started)
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident() - before
    flops = flops_per_crop(config)
    rate = config.batch_size / statistics.median(times)
    return {
        "crops_per_s": rate,
        "gflop_per_crop": flops / 1e9,
        "gflop_per_s": rate * flops / 1e9,
        "memory_gib": used / 2**30,
        "states_gib": parameters * BYTES_OF_STATE / 2**30,
    }


def together(corpus: Corpus, config: RunConfig, runtime: Runtime, device: torch.device, seconds: float) -> float:
    """Crops/s of loading and training, through the loader that training uses."""
    state = TrainState.create(config, device)
    network = prepare_network(state.model, runtime, device)
    stream = CropStream(corpus, config, split_cases(corpus, config.seed)[0])
    sampler = MicroBatches(0, 1_000_000, config.batch_size, runtime.accumulate)
    batches = iter(train_loader(stream, sampler, runtime.num_workers, device.type == "cuda"))
    started, steps = time.perf_counter(), -2  # two steps to warm up
    while steps < 3 or time.perf_counter() - started < seconds:
        backward(state, network, [next(batches) for _ in range(runtime.accumulate)], config, device)
        update(state, config.base_lr, config)
        synchronize(device)
        steps += 1
        if steps == 0:
            started = time.perf_counter()
    return steps * config.batch_size / (time.perf_counter() - started)


def random_batch(config: RunConfig, size: int) -> dict[str, torch.Tensor]:
    """A batch as the loader gives it, of noise."""
    model, generator = config.model, torch.Generator().manual_seed(0)
    shape = (size, model.in_channels, *model.img_size)
    return {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "intensity": torch.tensor((1 / 255, 0.0)).expand(size, model.in_channels, 2),
        "exchange": torch.zeros(size, dtype=torch.int64),
        "flips": torch.zeros(size, 3, dtype=torch.bool),
        "jitter": torch.tensor((1.0, 0.0)).expand(size, 2),
        "ids_shuffle": torch.rand(size, model.num_tokens, generator=generator).argsort(1),
    }


def flops_per_crop(config: RunConfig) -> float:
    """Multiply-adds × 2 of forward and backward: matrix products and attention, counted in a run on one crop."""
    model = HiEndMAE(config.model)
    batch = random_batch(config, 1)
    # The plain attention kernel is made of matrix products, which the counter knows on every device.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(canonical_crops(batch, torch.device("cpu")), batch["ids_shuffle"]).loss.backward()
    return counter.get_total_flops()


def gemm_peak(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """GFLOP/s of large matrix products in the precision of the run."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.rand(n, n, device=device, dtype=dtype)
    best, spent = 0.0, 0.0
    while spent < seconds:
        started = time.perf_counter()
        a @ a
        synchronize(device)
        elapsed = time.perf_counter() - started
        best, spent = max(best, 2 * n**3 / elapsed / 1e9), spent + elapsed
    return best


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def resident() -> int:
    """Bytes of memory of this process now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """Most bytes of memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(figures: dict[str, Any]) -> str:
    """The figures as text, ratios first."""
    data, peak = figures["data"], figures["gemm_peak_gflop_per_s"]
    lines = ["Data path, one process (crops/s; ratio to nnU-Net's read):"]
    reference = data.get("nnU-Net .b2nd read")
    for name, rate in data.items():
        ratio = f"{rate / reference:7.2f} ×" if reference else ""
        lines.append(f"  {name:<22} {rate:9.1f}  {ratio}")
    lines += [f"Constant patches in {n}: {share:.1%}" for n, share in figures["constant_patches"].items()]
    measured = figures["step"]
    lines.append(
        f"Step: {measured['crops_per_s']:.2f} crops/s, {measured['gflop_per_s'] / peak:.0%} of the measured GEMM peak "
        f"({measured['gflop_per_s']:.0f} of {peak:.0f} GFLOP/s, {measured['gflop_per_crop']:.1f} GFLOP a crop)"
    )
    lines.append(
        f"Memory: {measured['memory_gib']:.2f} GiB, of which {measured['states_gib']:.2f} GiB are parameters, "
        f"gradients and optimizer state"
    )
    for name, rate in figures["together"].items():
        lines.append(f"Loading and step together, {name}: {rate:.2f} crops/s, limited by {limit(figures, name)}")
    return "\n".join(lines)


def limit(figures: dict[str, Any], corpus: str) -> str:
    """What is slower when both run side by side."""
    loading = figures["data"][corpus] * max(figures["num_workers"], 1)
    return "the step" if loading > figures["step"]["crops_per_s"] else "loading (more -num_workers, or hiendmae_pack)"
