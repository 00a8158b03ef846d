"""What ends a command: its exit code and its line."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from nnunetv2_hiendmae.command import full_memory, verdict


def raised_while_stopping(first: type[BaseException]) -> BaseException:
    try:
        try:
            raise first
        finally:
            raise RuntimeError("cannot join thread before it is started")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(("first", "code"), [(KeyboardInterrupt, 130), (OSError, 1)])
def test_what_stopping_raises_does_not_hide_ctrl_c(first: type[BaseException], code: int) -> None:
    found, line = verdict(raised_while_stopping(first), "the same command continues")
    assert found == code
    assert line.startswith("interrupted") == (code == 130)


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU"),
        (RuntimeError("CUDA error: out of memory"), "the GPU"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "the GPU"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "this machine"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "this machine"),
        (MemoryError("Caught MemoryError in DataLoader worker process 0."), "this machine"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_whose_memory_is_full(error: BaseException, whose: str | None) -> None:
    """The remedies differ: smaller batches for a GPU, fewer processes for a machine."""
    assert full_memory(error) == whose
    if whose is not None:
        assert verdict(error, "")[1].startswith(f"error: the memory of {whose} is full")
