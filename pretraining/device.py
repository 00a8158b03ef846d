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
        self.copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def arrived(self) -> bool:
        """Whether the device has done all that was queued before."""
        return self.copied is None or self.copied.query()

    def get(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.tolist()


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
