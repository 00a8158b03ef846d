"""The weights file, where the trainer finds it, and how it goes into a network (contract: plain data, strict keys)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from nnunetv2.paths import nnUNet_results
from torch import Tensor

from nnunetv2_hiendmae import __version__
from nnunetv2_hiendmae.architectures.pos_embed import interpolate_pos_embed
from nnunetv2_hiendmae.architectures.vit import MAX_TOKENS, ViT, ViTConfig
from nnunetv2_hiendmae.foreign import check_shapes, convert_official
from nnunetv2_hiendmae.intensity import check_window

__all__ = [
    "LoadReport",
    "Weights",
    "convert_official",
    "find_weights",
    "load_encoder",
    "load_weights",
    "save_weights",
    "tensors_sha256",
]

FORMAT = "hiendmae_weights"
FORMAT_VERSION = 1
WEIGHTS_FILE = "encoder_weights.pth"
CITATION = (
    "Tang, F., Yao, Q., Ma, W., Wu, C., Jiang, Z., Zhou, S. K.: Hi-End-MAE: Hierarchical encoder-driven masked "
    "autoencoders are stronger vision learners for medical image segmentation. Medical Image Analysis (2025), "
    "doi 10.1016/j.media.2025.103770"
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """An encoder and where it comes from."""

    path: Path
    encoder: State
    """``ViT.state_dict`` keys; ``pos_embed`` only if it was learned."""
    header: dict[str, Any]
    """Plain data: architecture, window_hu, spacing, img_size, datasets, steps, versions, sha256, licence, citation."""

    @property
    def architecture(self) -> ViTConfig:
        return ViTConfig.from_dict(self.header["architecture"])

    @property
    def window_hu(self) -> tuple[float, float]:
        low, high = self.header["window_hu"]
        return float(low), float(high)

    @property
    def sha256(self) -> str:
        return self.header["sha256"]


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor when weights met a network."""

    used: list[str]
    dropped: list[str]
    """In the file, without a place in the network."""
    fresh: list[str]
    """In the network, not in the file: newly initialised."""


def tensors_sha256(state: State) -> str:
    """Hash of names, dtypes, shapes and bytes, independent of how the file was written."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(path: Path, encoder: State, header: dict[str, Any]) -> str:
    """Write a weights file atomically; ``header`` gains versions, sha256 and citation. Returns the sha256."""
    sha256 = tensors_sha256(encoder)
    header = {
        **header,
        "sha256": sha256,
        "versions": {"nnunetv2_hiendmae": __version__, "torch": str(torch.__version__)},
        "citation": CITATION,
    }
    header = json.loads(json.dumps(header))  # plain data, or an error now rather than when it is loaded
    data = {"format": FORMAT, "version": FORMAT_VERSION, "header": header, "encoder": encoder}
    with atomic_file(path) as file:
        torch.save(data, file)
    return sha256


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole and on disk; else an older one stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> Any:
    """``torch.load`` of plain data only. ``ValueError`` if the file is none or holds code.

    Mapped from disk where the format allows, so that a file of several GB is not held in memory twice.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"The weights file {path} does not exist.") from None
    except pickle.UnpicklingError as error:  # torch's own advice, weights_only=False, would run foreign code
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds objects of {found[1]}" if found else "no such file format"
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"{path} is not a file of plain tensors, or it is damaged ({reason}).")


def load_weights(path: str | Path) -> Weights:
    """Read and check a weights file.

    Raises:
        ValueError: not such a file, a newer format, or tensors that do not match the header's sha256.
    """
    path = Path(path)
    data = load_tensors(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a Hi-End-MAE weights file. A checkpoint of the authors becomes one with "
            f"'hiendmae_import_weights {path} -o weights.pth'."
        )
    if isinstance(data.get("version"), int) and data["version"] > FORMAT_VERSION:
        raise ValueError(f"{path} has weights format {data['version']}; this version reads up to {FORMAT_VERSION}.")
    try:
        check_content(data["encoder"], data["header"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # a header may hold anything
        raise ValueError(f"{path} is no sound weights file: {type(error).__name__}: {error}") from None
    weights = Weights(path, data["encoder"], data["header"])
    if tensors_sha256(weights.encoder) != weights.sha256:
        raise ValueError(f"{path} is damaged: its tensors do not match the sha256 in its header.")
    return weights


def check_content(encoder: State, header: dict[str, Any]) -> None:
    """Refuse a header that does not describe the tensors, before a network of that architecture is built.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: what is missing, of another kind or size.
    """
    config = ViTConfig.from_dict(header["architecture"])
    check_window(header["window_hu"])
    h, w, d = header["img_size"]
    if not all(type(n) is int and n > 0 for n in (h, w, d)):
        raise ValueError(f"img_size {header['img_size']} must be three positive integers")
    if not isinstance(header["sha256"], str):
        raise TypeError(f"sha256 is {header['sha256']!r}")
    for spacing in header.get("spacing", {}).values():
        _ = [float(mm) for mm in spacing]
    for data in header.get("datasets", []):
        _ = data["name"], data["cases"]
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in encoder.values()):
        raise ValueError("the encoder holds other things than floating-point tensors")
    stem = encoder["patch_embed.proj.weight"]
    blocks = {name.split(".")[1] for name in encoder if name.startswith("blocks.")}
    if (config.embed_dim, config.in_channels, *config.patch_size) != tuple(stem.shape) or len(blocks) != config.depth:
        raise ValueError("its header and its tensors are of different architectures")
    tokens = math.prod(-(-s // p) for s, p in zip(header["img_size"], config.patch_size, strict=True))
    if tokens > MAX_TOKENS:
        raise ValueError(f"img_size {header['img_size']} makes {tokens} tokens, more than {MAX_TOKENS}")
    grid = header["pos_embed_grid"] if "pos_embed" in encoder else (1, 1, 1)
    if math.prod(grid) > MAX_TOKENS:
        raise ValueError(f"pos_embed_grid {grid} is too large")
    check_shapes(encoder, config, tuple(grid), "pos_embed" in encoder)


def find_weights(named_in_plans: str | None) -> tuple[Path, str]:
    """The weights file to start from and why: env var, then plans, then the newest finished pre-training.

    Raises:
        ValueError: none found, or the one named does not exist.
    """
    for source, name in (
        ("the environment variable HIENDMAE_WEIGHTS", os.environ.get("HIENDMAE_WEIGHTS")),
        ("the plans", named_in_plans),
    ):
        if name:
            if not Path(name).is_file():
                raise ValueError(f"The weights file {name}, named by {source}, does not exist.")
            return Path(name), f"named by {source}"
    results = nnUNet_results.get()
    found = list(Path(results).glob(f"Dataset*/HiEndMAE__*__*/*/{WEIGHTS_FILE}")) if results else []
    if found:
        return max(found, key=lambda p: p.stat().st_mtime), "the newest finished pre-training under nnUNet_results"
    raise ValueError(
        "No Hi-End-MAE weights found. Pre-train with 'hiendmae_pretrain -d DATASET', or convert the authors' "
        "checkpoint with 'hiendmae_import_weights official.pth -o weights.pth' and name it in the environment "
        "variable HIENDMAE_WEIGHTS or with 'hiendmae_plan -d DATASET --weights weights.pth'. To train without "
        "pre-trained weights choose -tr nnUNetTrainerHiEndMAE_scratch."
    )


def load_encoder(vit: ViT, weights: Weights, image_channels: int) -> LoadReport:
    """Copy an encoder into a ViT of the same architecture, in place.

    The patch embedding is spread over the image channels: summed over the file's channels, divided by
    ``image_channels``, so a constant copy of one channel in all gives the features of that channel. Channels beyond
    them (a cascade's one-hot segmentation) start at 0. A learned position embedding is interpolated to the grid; a
    fixed one is regenerated by the network.

    Raises:
        ValueError: keys or shapes do not match; lists which.
    """
    state, wanted = dict(weights.encoder), vit.state_dict()
    dropped = [name for name in ("cls_token",) if name in state and name not in wanted]
    for name in dropped:
        del state[name]
    fresh = []
    if "pos_embed" in wanted and "pos_embed" not in state:
        state["pos_embed"] = wanted["pos_embed"]  # sine-cosine, which the file was trained with
        fresh.append("pos_embed (sine-cosine)")
    elif "pos_embed" in state:
        grid = tuple(weights.header["pos_embed_grid"])
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"].float(), grid, vit.grid)
    stem = "patch_embed.proj.weight"
    if stem in state:
        state[stem] = spread_channels(state[stem], wanted[stem].shape[1], image_channels)
    check_keys(state, wanted, str(weights.path))
    vit.load_state_dict(state, strict=True)
    return LoadReport(sorted(set(state) - {"pos_embed"} if fresh else state), dropped, fresh)


def spread_channels(weight: Tensor, channels: int, image_channels: int) -> Tensor:
    """Patch-embedding weight ``(E, C_file, p, p, p)`` for ``channels`` input channels; see ``load_encoder``."""
    if weight.shape[1] == channels == image_channels:
        return weight
    spread = weight.sum(1, keepdim=True).expand(-1, image_channels, -1, -1, -1) / image_channels
    rest = spread.new_zeros(len(spread), channels - image_channels, *spread.shape[2:])
    return torch.cat([spread, rest], dim=1)


def check_keys(state: State, wanted: State, source: str) -> None:
    """``ValueError`` naming missing and unexpected keys and differing shapes, if there are any."""
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in sorted(set(wanted) & set(state))
        if state[k].shape != wanted[k].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit: {'; '.join(problems)}.")
