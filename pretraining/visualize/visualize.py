"""The whole of ``hiendmae_visualize``, picture by picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunetv2_hiendmae.architectures.encoder import untrained
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.crops import crop_around
from pretraining.data.b2nd import default_plans
from pretraining.data.corpus import TISSUE_MARGIN
from pretraining.device import pick_device
from pretraining.visualize.attention import (
    AttentionMap,
    decoder_attention,
    encoder_attention,
    token_of,
)
from pretraining.visualize.cases import Case, read_ct, read_preprocessed
from pretraining.visualize.features import FeatureColours, colours
from pretraining.visualize.figures import draw
from pretraining.visualize.page import write_page
from pretraining.visualize.panels import (
    Gallery,
    attention_panels,
    feature_panels,
    reconstruction_panels,
)
from pretraining.visualize.source import Source, Spacing, open_source
from pretraining.visualize.tiles import crop_at, encode_volume, reconstruct_volume
from pretraining.visualize.views import Orientation

OUTPUTS = ("reconstruction.png", "attention.png", "features.png", "index.html", "reconstruction.nii.gz")
NUM_MASKS = 64
"""Masks that the decoder's attention is averaged over; each leaves a patch visible with a chance of a quarter."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to look at: one network, and one CT, which is either ``image`` or ``case`` of ``dataset``."""

    run: Path
    """Folder of a run, or a weights file."""
    output: Path
    image: Path | None = None
    """CT in HU: a file, or a folder of one DICOM series."""
    dataset: str | None = None
    case: str | None = None
    plans: str | None = None
    """Of the data set; None: those of the run."""
    voxel: tuple[int, int, int] | None = None
    """``(x, y, z)`` of the CT, from 0; None: the middle of the body."""
    spacing: Spacing | None = None
    """For an ``image``, mm, slices first; None: that of the pre-training."""
    seed: int = 0
    device: str = "cpu"


def visualize(request: Request) -> None:
    """What the command does. ``ValueError`` for a user's mistake, ``OSError`` if a file cannot be written."""
    source = open_source(request.run, pick_device(request.device, 1))
    case = read_case(request, source)
    voxel = case.voxel(request.voxel)
    request.output.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:  # of an earlier call: pictures of two networks must not lie side by side
        (request.output / name).unlink(missing_ok=True)
    orientation = Orientation.of(case.frame)
    x, y, z = request.voxel or case.original_voxel(voxel)
    caption = f"{source.name} on {case.name}"
    low, high = case.window_hu
    facts = [
        f"CT {case.name}: {' × '.join(map(str, case.original_size))} voxels, shown at {show_mm(case.frame.spacing)} mm "
        f"as the network sees it, {low:g}…{high:g} HU (width {high - low:g}, level {(low + high) / 2:g}). "
        f"Voxel {x} {y} {z} (x, y, z from 0).",
        f"Network {source.name}: crops of {' × '.join(map(str, source.img_size))} voxels, patches of "
        f"{' × '.join(map(str, source.encoder.config.patch_size))}, {source.steps or 'unknown'} steps. "
        f"Seed {request.seed}.",
    ]
    print("\n".join(facts), flush=True)
    galleries = []
    if source.model is None:
        print(f"{source.name} holds an encoder only: reconstruction and the decoder's attention are left out; "
              "they need the run's folder (-run FOLDER).", flush=True)  # fmt: skip
    else:
        galleries.append(reconstruction(source, case, voxel, request))
    galleries.append(attention(source, case, voxel, request.seed))
    galleries.append(features(source, case, voxel, request.seed))
    for gallery in galleries:
        picture = request.output / f"{gallery.key}.png"
        draw(gallery, orientation, case.window_hu, f"{gallery.title}: {caption}", picture)
    page = request.output / "index.html"
    write_page(galleries, orientation, case.window_hu, caption, facts, page)
    names = ", ".join(f"{g.key}.png" for g in galleries)
    print(f"Pictures in {request.output}: {names}\nOpen {page.absolute()} in a browser.")


def read_case(request: Request, source: Source) -> Case:
    """The CT that is asked for. ``ValueError`` if it is not there or its spacing is not known."""
    if request.dataset is not None and request.case is not None:
        plans, configuration = source.plans or (default_plans([request.dataset]), "3d_fullres")
        plans = request.plans or plans
        case = read_preprocessed(request.dataset, request.case, plans, configuration, source.window_hu)
        here = case.frame.spacing[::-1]  # of whole voxels: not exactly that of the plans
        if source.spacings and not any(np.allclose(here, known, rtol=0.1) for known in source.spacings):
            known = " or ".join(map(show_mm, source.spacings))
            print(f"WARNING: the case has {show_mm(here)} mm, the network knows {known} mm; name other plans with -p.")
        return case
    if request.image is None or not request.image.exists():
        raise ValueError(f"-i {request.image} does not exist.")
    return read_ct(request.image, choose_spacing(request, source), source.window_hu)


def show_mm(spacing: Spacing) -> str:
    """For people."""
    return " × ".join(f"{mm:.3g}" for mm in spacing)


def choose_spacing(request: Request, source: Source) -> Spacing:
    """The one asked for, or the one that the pre-training had. ``ValueError`` if that is none or several."""
    if request.spacing is not None:
        return request.spacing
    if len(source.spacings) == 1:
        return source.spacings[0]
    known = " or ".join(" ".join(f"{mm:g}" for mm in s) for s in source.spacings)
    why = f"was pre-trained at several spacings ({known} mm)" if known else "does not record its spacing"
    if not known and source.model is not None:
        why += " until it is finished"
    raise ValueError(f"-run {request.run} {why}; name one in mm, slices first, e.g. -spacing 1.5 1.5 1.5.")


def show(batches: list[Any]) -> Iterator[Any]:
    """Batches of crops, with a progress bar in a terminal."""
    return iter(tqdm(batches, unit="batch", disable=not sys.stderr.isatty(), leave=False))


def reconstruction(source: Source, case: Case, voxel: Size, request: Request) -> Gallery:
    """The whole CT rebuilt; also writes ``reconstruction.nii.gz``."""
    assert source.model is not None
    result = reconstruct_volume(source.model, case.volume, request.seed, show)
    case.save(result.rebuilt, request.output / "reconstruction.nii.gz")
    hidden = result.masked & (case.volume > TISSUE_MARGIN)
    width = case.window_hu[1] - case.window_hu[0]
    predicted, flat = (
        float(np.abs(v - case.volume)[hidden].mean()) * width if hidden.any() else 0.0
        for v in (result.rebuilt, result.flat)
    )
    numbers = (
        f"Mean absolute error in hidden patches, voxels of the body: {predicted:.0f} HU; filling each with its mean "
        f"instead: {flat:.0f} HU."
    )
    print(numbers, flush=True)
    text = (
        "Hidden patches are blue in the second picture; visible ones are pasted back into the reconstruction. The "
        "network predicts the pattern within a patch; its mean and contrast are given back from the original, so "
        "patches fit their surroundings in brightness whatever was learned. " + numbers
    )
    panels = reconstruction_panels(case, result)
    return Gallery(key="reconstruction", title="Reconstruction", text=text, panels=panels, voxel=voxel,
                   scales=("hu", "error"))  # fmt: skip


def attention(source: Source, case: Case, voxel: Size, seed: int) -> Gallery:
    """Attention of the voxel's patch within the crop around it."""
    config, size = source.encoder.config, source.img_size
    start = crop_around(voxel, case.volume.shape, size)
    x = crop_at(case.volume, start, size).to(source.encoder.stem.weight.device)
    token = token_of(voxel, start, config.patch_size, source.encoder.grid)
    named: list[tuple[str, AttentionMap]] = [
        (f"encoder, layer {a.layer}", a) for a in encoder_attention(source.encoder, x, token)
    ]
    text = (
        "Colour: where the outlined patch looks, mean over heads, per patch. Encoder: self-attention of the tapped "
        f"layers (counted from 0, of {config.depth}), all patches visible. "
    )
    if source.model is not None:
        maps = decoder_attention(source.model, x, token, seed, NUM_MASKS)
        named += [(f"decoder block {len(maps) - i}, querying layer {a.layer}", a) for i, a in enumerate(maps)]
        text += (
            f"Decoder: cross-attention of the hidden patch to the visible ones, mean over {NUM_MASKS} random masks. "
            if maps
            else "This run's decoder has no cross-attention. "
        )
    text += "The captions compare the strongest weight with attention spread evenly."
    query = np.zeros(size, bool)
    corner = [(v - s) // p * p for v, s, p in zip(voxel, start, config.patch_size, strict=True)]
    query[tuple(slice(c, c + p) for c, p in zip(corner, config.patch_size, strict=True))] = True
    h, w, d = (v - s for v, s in zip(voxel, start, strict=True))
    panels = attention_panels(x[0, 0].cpu().numpy(), query, named, config.patch_size)
    return Gallery(key="attention", title="Attention", text=text, panels=panels, voxel=(h, w, d),
                   scales=("attention",), columns=len(panels))  # fmt: skip


def features(source: Source, case: Case, voxel: Size, seed: int) -> Gallery:
    """Tapped layers of the pre-trained encoder beside those of random weights."""
    config = source.encoder.config
    named: list[tuple[str, FeatureColours]] = []
    for name, encoder in (("pre-trained", source.encoder), ("random", untrained(source.encoder, seed))):
        tokens = encode_volume(encoder, case.volume, source.img_size, TISSUE_MARGIN, show)
        found = colours(tokens, config.taps, case.volume.shape, source.img_size, config.patch_size)
        named += [(f"{name}, layer {f.layer}", f) for f in found]
    text = (
        "Each patch's features, less what its place in the crop and the crop as a whole explain, reduced to the three "
        "directions in which the patches of this CT differ most: red, green and blue. Patches of like colour have "
        "like features. Colours cannot be compared between pictures, each has its own directions. The captions give "
        "the share of variance that place explains and, of the rest, the shares of red, green and blue."
    )
    panels = feature_panels(case, named)
    return Gallery(key="features", title="Features", text=text, panels=panels, voxel=voxel,
                   columns=len(panels))  # fmt: skip
