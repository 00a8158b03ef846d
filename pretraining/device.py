"""The device that computes, and the precision it is good at."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from pretraining import distributed
from pretraining.processes import usable_cores


def pick_device(name: str, ranks_here: int) -> torch.device:
    """``ValueError`` if the machine lacks the device.

    On the CPU all cores compute, or as many as OMP_NUM_THREADS says; on a GPU one feeds it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda: torch finds no CUDA device. Use -device cpu (and -preset tiny) or mps.")
    if name == "cuda" and torch.cuda.device_count() < ranks_here:
        raise ValueError(f"-num_gpus {ranks_here}: torch finds {torch.cuda.device_count()} CUDA devices.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("-device mps: torch finds no Apple GPU. Use -device cpu (and -preset tiny).")
    if name != "cpu":
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:  # torch has read it
        torch.set_num_threads(max(usable_cores() // ranks_here, 1))
    return torch.device(name, distributed.local_rank()) if name == "cuda" else torch.device(name)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for. From memory that is not pinned, CUDA would make this thread wait."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class Reading:
    """Numbers on their way from the device; reading them waits for nothing that was queued later."""

    def __init__(self, values: Tensor) -> None:
        self.host = values.to("cpu", non_blocking=values.is_cuda)  # into pinned memory
        self.copied = queue_event(values.device)

    def get(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.tolist()


class Fetch:
    """A fetch of data that has just ended, and for how much of it the device had nothing to do."""

    def __init__(self, seconds: float, before: Reading | None, device: torch.device) -> None:
        self.seconds, self.copied = seconds, None if before is None else before.copied
        """What the fetch took, and the end of what was queued before it."""
        self.begun = queue_event(device)

    def idle(self) -> float:
        """Seconds; known when a step that was queued after the fetch is done."""
        if self.copied is None or self.begun is None:  # not on a GPU, or nothing was queued
            return self.seconds
        return min(self.seconds, self.copied.elapsed_time(self.begun) / 1000)


def queue_event(device: torch.device) -> torch.cuda.Event | None:
    """The moment when a GPU has done all that is queued; elsewhere that is now, and needs no event."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def default_precision(device: str) -> str:
    """bf16 where the GPU computes with it, fp16 on older ones, fp32 elsewhere."""
    if device != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
