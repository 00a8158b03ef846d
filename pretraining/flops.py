"""What a step computes, and how fast the device could be at it."""

from __future__ import annotations

import time

import torch

from pretraining.config import ModelConfig
from pretraining.device import synchronize
from pretraining.model import HiEndMAE


def flops_per_crop(config: ModelConfig) -> float:
    """Multiply-adds × 2 of forward and backward: matrix products and attention, counted on shapes alone."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton: a third of a second of every command

    with torch.device("meta"):
        model = HiEndMAE(config)
        crop = torch.empty(1, config.in_channels, *config.img_size)
        ids_shuffle = torch.empty(1, config.num_tokens, dtype=torch.int64)
    # The plain attention kernel is made of matrix products, which the counter knows on every device.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(crop, ids_shuffle).loss.backward()
    return counter.get_total_flops()


def matrix_product(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of large matrix products in the precision of the run, the fastest of ``seconds``."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.rand(n, n, device=device, dtype=dtype)
    best, spent = 0.0, 0.0
    while spent < seconds:
        started = time.perf_counter()
        a @ a
        synchronize(device)
        elapsed = time.perf_counter() - started
        best, spent = max(best, 2 * n**3 / elapsed), spent + elapsed
    return best
