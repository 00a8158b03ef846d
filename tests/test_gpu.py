"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import time

import pytest
import torch
from processes import Numbers

from pretraining.config import PRESETS, RunConfig, Runtime
from pretraining.data.loader import MicroBatches, train_loader
from pretraining.device import Fetch, Reading
from pretraining.speed import random_batch
from pretraining.step import TrainState, agree, backward, prepare_network, update

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nothing_in_a_step_waits_for_the_device(precision: str) -> None:
    """torch raises at every wait; numbers are read one step late, by an event."""
    model = PRESETS["nano"].model(crop_size=(32, 32, 32), patch_size=(4, 4, 4), in_channels=1, mask_ratio=0.75)
    config = RunConfig(
        datasets=("X",), plans="p", configuration="c", model=model, steps=9, batch_size=16, precision=precision,
        grad_clip=1.0,
    )  # fmt: skip
    device = torch.device("cuda", 0)
    state = TrainState.create(config, device)
    network = prepare_network(state.model, Runtime(device="cuda", accumulate=2), device)
    batches = [{k: v.contiguous().pin_memory() for k, v in random_batch(config, 8).items()} for _ in range(2)]
    readings = []
    for number in range(5):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step makes the optimizer's state
        try:
            loss, grad_norm = backward(state, network, batches, config, device)
            shared = agree(state, loss, grad_norm, stop=False)
            update(state, 1e-4, shared)
            readings.append(Reading(shared))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.tensor(reading.get()).isfinite().all() for reading in readings[2:])


@needs_gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_loader_processes_write_is_pinned(num_workers: int) -> None:
    """Twice in a process: what the first run locked is let go of."""
    for _ in range(2):
        copies = []
        for batch in train_loader(Numbers(), MicroBatches(0, 20, 6), num_workers, pin_memory=True):
            assert batch["image"].is_pinned()
            copies.append(batch["image"].to("cuda", non_blocking=True))
            torch.cuda.synchronize()  # a run reads its loss one step late
        assert torch.stack(copies)[..., 0].flatten().tolist() == [i for i in range(120) for _ in range(64)]


@needs_gpu
def test_waiting_is_only_what_the_device_waited() -> None:
    """A fetch of 0.2 s: beside work of 0.5 s it cost nothing, after work that is done, all of its time."""
    device = torch.device("cuda", 0)
    cycles = 10**6
    torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    second = cycles * 1000 / begin.elapsed_time(end)
    for work, idle in ((0.5, 0.0), (0.0, 0.2)):
        torch.cuda._sleep(int(work * second))
        before = Reading(torch.zeros(4, device=device))
        time.sleep(0.2)
        fetch = Fetch(0.2, before, device)
        Reading(torch.zeros(4, device=device)).get()
        assert fetch.idle() == pytest.approx(idle, abs=0.05)


def test_elsewhere_a_fetch_is_waited_for() -> None:
    assert Fetch(0.2, Reading(torch.zeros(4)), torch.device("cpu")).idle() == 0.2
