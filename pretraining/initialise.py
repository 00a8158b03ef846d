"""``-init``: a pre-training that starts from the weights of another, of the authors, or of another program.

Rules. The encoder must be of the same kind, width, depth, heads and MLP; it is taken whole. Channels, tokens and token
grid may differ: patch embedding and learned positions are made to fit (``weights.file.fitted``), fixed positions are
computed anew. The decoder is taken whole, or not at all: if the file has one of the same sizes that queries the same
taps in the same way; its last layer, which writes voxels, only if patch and channels are the same as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.architectures.kinds import encoder_config
from nnunetv2_hiendmae.weights.file import (
    CITATION,
    WEIGHTS_FILE,
    LoadReport,
    check_keys,
    fitted,
    load_tensors,
    load_weights,
    non_finite,
    tensors_sha256,
)
from nnunetv2_hiendmae.weights.official import PUBLISHED_TAPS, Imported
from nnunetv2_hiendmae.weights.read import read_weights
from pretraining import distributed
from pretraining.checkpoint import checked, is_checkpoint, load_checkpoint, read_ancestry, write_ancestry
from pretraining.config import ModelConfig, RunConfig, plain
from pretraining.model import HiEndMAE

State = dict[str, Tensor]
ENCODER, HEAD = "encoder.", "decoder.head."


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a file has to start from."""

    path: Path
    words: str
    """What the file is."""
    encoder: State
    decoder: State
    """``HiEndMAE.state_dict`` without the encoder; empty if there is none."""
    header: dict[str, Any]
    """Of a weights file."""
    queries: tuple[Any, ...] = ()
    """How the decoder queries the encoder, where that is recorded: see ``queries_of``."""

    @property
    def architecture(self) -> EncoderConfig:
        return encoder_config(self.header["architecture"])


def queries_of(config: ModelConfig) -> tuple[Any, ...]:
    """What must agree, beside shapes, for a decoder to go on: mode, taps, heads."""
    return config.decoder, config.taps, config.decoder_num_heads


def open_origin(path: Path) -> Origin:
    """A run's folder, its checkpoint, a weights file, the authors' checkpoint, or another program's.

    Raises:
        ValueError: none of these, or damaged.
    """
    if not path.exists():
        raise ValueError(f"-init {path} does not exist; name a run's folder, a checkpoint or a file of weights.")
    if path.is_dir():
        try:
            return origin_of_run(path, load_checkpoint(path), path)
        except ValueError as error:
            raise ValueError(f"-init {path}: {error} Name a folder with checkpoints, or a file of weights.") from None
    content = load_tensors(path)
    if is_checkpoint(content):
        return origin_of_run(path, checked(content, path), path.parent)
    try:
        return origin_of_file(path, read_weights(path))
    except ValueError as error:
        raise ValueError(
            f"-init {path}: {error} What a foreign file does not say, hiendmae_import_weights can be told; -init takes "
            f"the weights file that it writes."
        ) from None


def origin_of_file(path: Path, found: Imported) -> Origin:
    """An encoder, and the decoder that comes with it in the authors' files, which do not record its heads."""
    bad = non_finite({**found.encoder, **found.decoder})
    if bad:
        raise ValueError(f"It holds values that are not finite ({bad}).")
    return Origin(
        path=path,
        words=found.kind,
        encoder=found.encoder,
        decoder=found.decoder,
        header=found.header,
        queries=("hierarchical", PUBLISHED_TAPS, None),
    )


def origin_of_run(path: Path, checkpoint: dict[str, Any], folder: Path) -> Origin:
    """Encoder and decoder of a pre-training, finished or not."""
    config = RunConfig.from_dict(checkpoint["config"])
    weights: State = checkpoint["network_weights"]
    exported = folder / WEIGHTS_FILE
    header = {
        "pos_embed_grid": plain(config.model.grid),
        "img_size": plain(config.model.img_size),
        "window_hu": plain(config.window_hu),
        "datasets": [{"name": name, "cases": None} for name in config.datasets],
        "licence": "that of the training data; not stated",
        "ancestry": read_ancestry(folder, config),
        "citation": CITATION,
        **(load_weights(exported).header if exported.is_file() else {}),
        "architecture": config.model.encoder.to_dict(),
        "steps": checkpoint["step"],
    }
    return Origin(
        path=path,
        words=f"a pre-training after {checkpoint['step']} of {config.steps} steps",
        encoder={k.removeprefix(ENCODER): v for k, v in weights.items() if k.startswith(ENCODER)},
        decoder={k: v for k, v in weights.items() if not k.startswith(ENCODER)},
        header=header,
        queries=queries_of(config.model),
    )


def check_origin(origin: Origin, config: RunConfig) -> None:
    """``ValueError`` naming both if the run asks for another encoder, or for another HU window."""
    has, wants = origin.architecture.to_dict(), config.model.encoder.to_dict()
    differ = [
        f"{name} is {has.get(name)} in the file, {wants.get(name)} in the run"
        for name in {**has, **wants}
        if name not in ("taps", "patch_size", "in_channels") and has.get(name) != wants.get(name)
    ]
    if differ:
        raise ValueError(f"-init {origin.path} holds another encoder: {'; '.join(differ)}. Choose its own -preset.")
    window = tuple(origin.header["window_hu"])
    # Files of programs that do not use a window were given one when they were read.
    if "normalization" not in origin.header and window != config.window_hu:
        raise ValueError(
            f"-init {origin.path} was trained on {window[0]:g} to {window[1]:g} HU, the run has "
            f"{config.window_hu[0]:g} to {config.window_hu[1]:g}. Add -window_hu {window[0]:g} {window[1]:g}."
        )


def initialise(model: HiEndMAE, file: Path, folder: Path) -> None:
    """Start a fresh model from a file; the first rank says what was taken and keeps the ancestry in its folder."""
    ancestry = start_from(model, open_origin(file))
    if distributed.rank() == 0:
        write_ancestry(folder, ancestry)
        print(*lines_of(ancestry[0]), sep="\n", flush=True)


def start_from(model: HiEndMAE, origin: Origin) -> list[dict[str, Any]]:
    """Put an origin's tensors into a fresh model, in place; returns the ancestry, nearest first, as plain data."""
    wanted = model.state_dict()
    grid = origin.header.get("pos_embed_grid")
    encoder, report = fitted(origin.encoder, model.encoder, grid and tuple(grid), model.config.in_channels)
    decoder = decoder_that_fits(model, origin, {k: v for k, v in wanted.items() if not k.startswith(ENCODER)})
    taken = {**{ENCODER + k: v for k, v in encoder.items()}, **decoder}
    optional = {ENCODER + name for name in model.encoder.config.pretraining_only}
    state = {**{k: v for k, v in wanted.items() if k in optional or not k.startswith(ENCODER)}, **taken}
    check_keys(state, wanted, str(origin.path))
    model.load_state_dict(state)
    fresh = sorted(set(wanted) - set(taken))
    dropped = sorted([ENCODER + name for name in report.dropped] + [k for k in origin.decoder if k not in decoder])
    return [entry(origin, report, len(taken), fresh, dropped), *origin.header.get("ancestry", [])]


def decoder_that_fits(model: HiEndMAE, origin: Origin, wanted: State) -> State:
    """The decoder's tensors, less its last layer where that writes other voxels; none if it is another decoder."""
    mode, taps, heads = queries_of(model.config)
    if not origin.decoder or origin.queries not in ((mode, taps, heads), (mode, taps, None)):
        return {}
    body = {k: v for k, v in wanted.items() if not k.startswith(HEAD)}
    if any(k not in origin.decoder or origin.decoder[k].shape != v.shape for k, v in body.items()):
        return {}
    config, had = model.config, origin.architecture
    same_voxels = (had.patch_size, had.in_channels) == (config.patch_size, config.in_channels)
    return {k: origin.decoder[k] for k in (wanted if same_voxels else body)}


def entry(origin: Origin, report: LoadReport, taken: int, fresh: list[str], dropped: list[str]) -> dict[str, Any]:
    """What the header of the new weights says of its origin."""
    names = ("architecture", "window_hu", "img_size", "spacing", "datasets", "patients", "steps", "decoder",
             "provenance", "normalization", "source", "source_citations", "licence", "citation")  # fmt: skip
    facts = {name: origin.header[name] for name in names if name in origin.header}
    return plain({
        "file": origin.path.name,
        "form": origin.words,
        "sha256": tensors_sha256(origin.encoder),
        **facts,
        "taken": taken,
        "resized": report.resized,
        "fresh": fresh,
        "dropped": dropped,
    })  # fmt: skip


def lines_of(ancestry: dict[str, Any]) -> list[str]:
    """What was taken, resized, fresh and dropped, for people."""
    resized = "; ".join(f"{name} {how}" for name, how in ancestry["resized"].items())
    return [
        f"Started from {ancestry['file']}: {ancestry['form']}; sha256 {ancestry['sha256']}",
        f"  taken: {ancestry['taken']} tensors; resized: {resized or 'none'}",
        f"  fresh: {modules(ancestry['fresh'])}; dropped: {modules(ancestry['dropped'])}",
        f"  its licence: {ancestry.get('licence', 'not stated')}",
    ]


def modules(names: list[str]) -> str:
    """Tensors by module: ``decoder (40 tensors), mask_token``."""
    groups: dict[str, int] = {}
    for name in names:
        group = name if name.startswith((ENCODER, HEAD)) else name.split(".")[0]
        groups[group] = groups.get(group, 0) + 1
    return ", ".join(f"{name} ({n} tensors)" if n > 1 else name for name, n in groups.items()) or "none"
