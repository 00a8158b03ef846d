"""The weights file, and how it goes into a network (contract: plain data, strict keys)."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_hiendmae import __version__
from nnunetv2_hiendmae.architectures.encoder import MAX_TOKENS, Encoder, EncoderConfig
from nnunetv2_hiendmae.architectures.kinds import encoder_config
from nnunetv2_hiendmae.architectures.patch_resize import resize_patch_embed
from nnunetv2_hiendmae.architectures.pos_embed import interpolate_pos_embed
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.files import atomic_file
from nnunetv2_hiendmae.identity import from_text
from nnunetv2_hiendmae.intensity import check_window
from nnunetv2_hiendmae.weights.official import check_shapes

FORMAT = "hiendmae_weights"
FORMAT_VERSION = 1
WEIGHTS_FILE = "encoder_weights.pth"
CITATION = (
    "Tang, F., Yao, Q., Ma, W., Wu, C., Jiang, Z., Zhou, S. K.: Hi-End-MAE: Hierarchical encoder-driven masked "
    "autoencoders are stronger vision learners for medical image segmentation. Medical Image Analysis (2025), "
    "doi 10.1016/j.media.2025.103770"
)

PRETRAINING_KEYS = {"network_weights", "step", "config"}
"""Of a checkpoint of hiendmae_pretrain."""
SCALAR = np.float64(0).__reduce__()[0]  # its module's name differs between numpy 1 and 2
NUMPY_NUMBERS: list[Any] = [
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "bool")),
]
"""Plain numbers as numpy has them, which nnU-Net writes into its checkpoints; written by numpy 1 and 2."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """An encoder and where it comes from."""

    path: Path
    encoder: State
    """``state_dict`` keys of the kind's network; a position embedding only if it was learned."""
    header: dict[str, Any]
    """Plain data: architecture, window_hu, spacing, img_size, datasets, patients, steps, versions, sha256, licence,
    citation."""

    @property
    def architecture(self) -> EncoderConfig:
        return encoder_config(self.header["architecture"])

    @property
    def window_hu(self) -> tuple[float, float]:
        low, high = self.header["window_hu"]
        return float(low), float(high)

    @property
    def patients(self) -> list[str] | None:
        """Fingerprints of the cases of the pre-training; None where the file does not say (older, or imported)."""
        found = self.header.get("patients")
        return None if found is None else [text for texts in found.values() for text in texts]

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
    resized: dict[str, str] = field(default_factory=dict)
    """Of the used ones: name and what was done to it."""


def tensors_sha256(state: State) -> str:
    """Hash of names, dtypes, shapes and bytes, independent of how the file was written."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def non_finite(value: Any, name: str = "") -> str | None:
    """Dotted name of a tensor in nested dicts and lists that holds NaN or infinity; None if there is none."""
    if isinstance(value, Tensor):
        return None if bool(value.isfinite().all()) else name
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next((bad for key, item in items if (bad := non_finite(item, f"{name}.{key}".lstrip(".")))), None)


def save_weights(path: Path, encoder: State, header: dict[str, Any]) -> str:
    """Write a weights file atomically; ``header`` gains versions, sha256 and citation. Returns the sha256.

    Raises:
        ValueError: a tensor is not finite; nothing is written.
    """
    bad = non_finite(encoder)
    if bad:
        raise ValueError(f"The encoder's {bad} holds values that are not finite; {path} was not written.")
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


def load_tensors(path: Path) -> Any:
    """``torch.load`` of plain data only. ``ValueError`` if the file is none or holds code.

    Mapped from disk where the format allows, so that a file of several GB is not held in memory twice.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"The weights file {path} does not exist.") from None
    except pickle.UnpicklingError as error:  # torch's own advice, weights_only=False, would run foreign code
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds objects of {found[1]}" if found else "no such file format"
    except Exception as error:  # the unpickler's errors have many roots: what is no file of tensors may hold anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"{path} is not a file of plain tensors, or it is damaged ({reason}).")


def refuse_pretraining(content: Any, path: str | Path) -> None:
    """``ValueError`` for a checkpoint of a pre-training, whose encoder lies beside it with a header."""
    if isinstance(content, Mapping) and set(content) >= PRETRAINING_KEYS:
        raise ValueError(
            f"{path} is a checkpoint of hiendmae_pretrain. Take encoder_weights.pth of its run; of an unfinished one "
            f"'hiendmae_pretrain ... --export' writes it."
        )


def load_weights(path: str | Path) -> Weights:
    """Read and check a weights file.

    Raises:
        ValueError: not such a file, a newer format, or tensors that do not match the header's sha256.
    """
    path = Path(path)
    data = load_tensors(path)
    refuse_pretraining(data, path)
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
    config = encoder_config(header["architecture"])
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
    for fingerprints in (header.get("patients") or {}).values():
        _ = [from_text(text) for text in fingerprints]
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in encoder.values()):
        raise ValueError("the encoder holds other things than floating-point tensors")
    bad = non_finite(encoder)
    if bad:
        raise ValueError(f"{bad} holds values that are not finite")
    stem = encoder[f"{config.stem}.weight"]
    layers = {config.layer_of(name) for name in encoder}
    sizes = (config.embed_dim, config.in_channels, *config.patch_size, config.depth + 2)
    if sizes != (*stem.shape, len(layers)):
        raise ValueError("its header and its tensors are of different architectures")
    tokens = math.prod(-(-s // p) for s, p in zip(header["img_size"], config.patch_size, strict=True))
    if tokens > MAX_TOKENS:
        raise ValueError(f"img_size {header['img_size']} makes {tokens} tokens, more than {MAX_TOKENS}")
    grid = header["pos_embed_grid"] if config.positions in encoder else (1, 1, 1)
    if math.prod(grid) > MAX_TOKENS:
        raise ValueError(f"pos_embed_grid {grid} is too large")
    check_shapes(encoder, config, tuple(grid))


def build_encoder(weights: Weights) -> Encoder:
    """The network of a weights file, for crops of its pre-training."""
    config = weights.architecture
    h, w, d = (n // p for n, p in zip(weights.header["img_size"], config.patch_size, strict=True))
    encoder = config.build_like(weights.encoder, (h, w, d))
    load_encoder(encoder, weights, config.in_channels)
    return encoder


def load_encoder(network: Encoder, weights: Weights, image_channels: int) -> LoadReport:
    """Copy an encoder into a network of the same architecture, in place; see ``fitted`` for what may differ.

    Raises:
        ValueError: keys or shapes do not match; lists which.
    """
    wanted = network.state_dict()
    grid = weights.header.get("pos_embed_grid")
    state, report = fitted(weights.encoder, network, grid and tuple(grid), image_channels)
    check_keys(state, wanted, str(weights.path))
    network.load_state_dict(state, strict=True)
    return report


def fitted(encoder: State, network: Encoder, grid: Size | None, image_channels: int) -> tuple[State, LoadReport]:
    """An encoder's tensors for a network of other channels, token grid or token size.

    A patch embedding of as many channels as there are image channels is kept. Any other is spread over them: summed
    over the file's channels, divided by ``image_channels``, so a constant copy of one channel in all gives the features
    of that channel. Channels beyond them (a cascade's one-hot segmentation) start at 0. For tokens of another size it
    is resized by the pseudo-inverse rule (``resize_patch_embed``). A learned position embedding, on ``grid``, is
    interpolated to the network's; a fixed one is regenerated by the network. What the network has no place for (the
    class token, positions where it has fixed ones) is dropped.
    """
    config, state, wanted = network.config, dict(encoder), network.state_dict()
    stem, positions = f"{config.stem}.weight", config.positions
    dropped = [name for name in (*config.pretraining_only, positions) if name in state and name not in wanted]
    for name in dropped:
        del state[name]
    fresh, resized = [], {}
    if positions in wanted and positions not in state:
        state[positions] = wanted[positions]  # sine-cosine, which the file was trained with
        fresh.append(f"{positions} (sine-cosine)")
    elif positions in state and grid is not None:
        state[positions] = interpolate_pos_embed(state[positions].float(), grid, network.grid)
        if grid != network.grid:
            resized[positions] = f"interpolated from {sizes(grid)} to {sizes(network.grid)} tokens"
    if stem in state and state[stem].ndim == 5:
        if state[stem].shape[1] != image_channels:
            resized[stem] = f"spread from {state[stem].shape[1]} to {image_channels} channels"
        state[stem] = spread_channels(state[stem], wanted[stem].shape[1], image_channels)
        if tuple(state[stem].shape[2:]) != config.patch_size:
            before = sizes(state[stem].shape[2:])
            state[stem], lost = resize_patch_embed(state[stem], config.patch_size)
            words = f"tokens of {before} to {sizes(config.patch_size)} voxels, {lost:.1%} of it lost"
            resized[stem] = "; ".join(filter(None, [resized.get(stem), words]))
    used = sorted(set(state) - {positions} if fresh else state)
    return state, LoadReport(used, dropped, fresh, resized)


def sizes(values: Iterable[int]) -> str:
    """``8 × 8 × 8``."""
    return " × ".join(map(str, values))


def spread_channels(weight: Tensor, channels: int, image_channels: int) -> Tensor:
    """Patch-embedding weight ``(E, C_file, p, p, p)`` for ``channels`` input channels; see ``load_encoder``."""
    if weight.shape[1] == image_channels:
        spread = weight
    else:
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
