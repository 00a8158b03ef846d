"""The process group: all of torch.distributed that pre-training uses. Alone, everything here does nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretraining.processes import when_the_parent_ends

GRACE_S = 60
"""For ranks that are left when another has failed: to write the non-finite step, or a checkpoint that was begun."""


def timeout() -> timedelta:
    """How long a rank waits for the others before it gives up; a validation or a checkpoint must fit.

    ``ValueError`` if ``HIENDMAE_TIMEOUT_MINUTES`` is no positive number.
    """
    minutes = os.environ.get("HIENDMAE_TIMEOUT_MINUTES", "15")
    with suppress(ValueError, OverflowError):
        if float(minutes) > 0:
            return timedelta(minutes=float(minutes))
    raise ValueError(f"The environment variable HIENDMAE_TIMEOUT_MINUTES is '{minutes}'; it must be a number above 0.")


def launched() -> bool:
    """Whether torchrun, or ``launch``, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Place on this node: which GPU is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group(device_type: str) -> Iterator[None]:
    """Join the group that the environment describes: NCCL on CUDA, gloo elsewhere."""
    if not launched():
        yield
        return
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout())
    yield
    # Not after a failure: NCCL would wait here for ranks that wait for this one. The process ends then anyhow.
    dist.destroy_process_group()


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with gradients averaged over the ranks, in buckets while the backward pass goes on."""
    if not launched():
        return model
    devices = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # Buffers are constants. torch 2.13 renamed the argument for that and warns on every rank.
    model.broadcast_buffers = False
    return model


def without_sync(model: nn.Module) -> AbstractContextManager[Any]:
    """For all but the last of accumulated micro-batches: gradients stay on this rank."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def mean(values: Tensor) -> Tensor:
    """Average over the ranks, in place."""
    if launched():
        dist.all_reduce(values)
        values /= world_size()
    return values


def launch(function: Callable[..., None], num_processes: int, *args: Any) -> int:
    """Run ``function(*args)`` in processes of this node that form a group; returns the highest exit code.

    Signals that ask for an early end are passed on to all of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(r, num_processes, port, function, args))
                 for r in range(num_processes)]  # fmt: skip
    for process in processes:
        process.start()

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the ranks as well
    alive = list(processes)
    while alive:
        for process in alive:
            process.join(0.2)
        if any(p.exitcode not in (None, 0) for p in alive):  # one died: the others would wait for it in vain
            end_all(alive)
        alive = [p for p in alive if p.exitcode is None]
    return max(1 if p.exitcode is None or p.exitcode < 0 else p.exitcode for p in processes)  # below 0: killed


def end_all(processes: list[Any]) -> None:
    """Wait for ranks that a failed one left, which may be writing what they know, then stop them."""
    for seconds, stop in ((GRACE_S, "terminate"), (5, "kill")):
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        for process in processes:
            getattr(process, stop)()


def run_rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """One process of ``launch``, with the environment that torchrun would give it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # If the launcher is killed, its ranks write a checkpoint and end instead of training on unseen.
    when_the_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    function(*args)
