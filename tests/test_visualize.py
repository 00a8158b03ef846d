"""``hiendmae_visualize``: real pictures of a real run, and the numbers behind them."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DATASET, World
from matplotlib.image import imread

from nnunetv2_hiendmae.architectures.encoder import untrained
from nnunetv2_hiendmae.crops import crop_around
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW
from pretraining.checkpoint import FINAL, save_checkpoint
from pretraining.commands import visualize
from pretraining.config import RunConfig
from pretraining.data.corpus import TISSUE_MARGIN
from pretraining.model import HiEndMAE
from pretraining.train import TrainState
from pretraining.visualize.attention import (
    decoder_attention,
    encoder_attention,
    token_of,
)
from pretraining.visualize.cases import read_ct, read_preprocessed
from pretraining.visualize.features import colours
from pretraining.visualize.source import Source, open_source
from pretraining.visualize.tiles import crop_at, encode_volume, reconstruct_volume

SPACING = (8.0, 6.0, 6.0)


class Tags(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def ct(world: World) -> Path:
    return next((world.root / "raw" / DATASET / "imagesTr").glob("*_0000.nii.gz"))


@pytest.fixture(scope="module")
def source(pretrained: Path) -> Source:
    return open_source(pretrained.parent, torch.device("cpu"))


def test_pictures_of_a_run(world: World, pretrained: Path, ct: Path, source: Source, tmp_path: Path) -> None:
    named = tmp_path / 'x<b>&"$é.nii.gz'
    shutil.copy(ct, named)
    out = tmp_path / "pictures"
    log = world.run(f"hiendmae_visualize -run {pretrained.parent} -i {named} -o {out} -voxel 20 15 12 -seed 3")
    assert "Warning" not in log
    assert "Voxel 20 15 12" in log and "index.html" in log
    for name in ("reconstruction", "attention", "features"):
        picture = imread(out / f"{name}.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.1, name
    assert not list(out.glob("*unfinished*")) and not list(out.glob("*.tmp"))

    text = (out / "index.html").read_text(encoding="utf-8")
    tags = Tags(text).found
    assert {tag for tag, _ in tags}.isdisjoint({"b", "link", "iframe"})
    assert "x&lt;b&gt;&amp;&quot;$é.nii.gz" in text
    addresses = [value or "" for _, a in tags for key, value in a.items() if key in ("src", "href", "srcset")]
    assert len(addresses) > 15 and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not re.search(r"https?:|@import|url\(", text)
    assert [a["type"] for tag, a in tags if tag == "input"].count("range") == 3

    image = sitk.ReadImage(str(out / "reconstruction.nii.gz"))
    original = sitk.ReadImage(str(ct))
    assert image.GetSize() == original.GetSize()  # the plans' spacing is that of the phantoms
    assert np.allclose(image.GetOrigin(), original.GetOrigin()) and image.GetDirection() == original.GetDirection()
    assert source.model is not None
    case = read_ct(ct, source.spacings[0], source.window_hu)
    hidden = reconstruct_volume(source.model, case.volume, 3).masked
    clipped = np.clip(sitk.GetArrayFromImage(original), *source.window_hu)
    difference = np.abs(sitk.GetArrayFromImage(image) - clipped)
    assert 0.7 < hidden.mean() < 0.8
    assert difference[~hidden].max() <= 0.51
    assert difference[hidden].max() > 50


def test_weights_alone_give_the_encoders_pictures(
    pretrained: Path, ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reconstruction.png").touch()  # of an earlier call
    code, log = command(monkeypatch, capsys, f"-run {pretrained} -i {ct} -o {tmp_path}")
    assert code == 0
    assert log.count("encoder only: reconstruction and the decoder's attention are left out") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attention.png", "features.png", "index.html"]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "encoder, layer 3" in page and "decoder block" not in page


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str) -> tuple[int, str]:
    """Exit code and all output."""
    monkeypatch.setattr(sys, "argv", ["hiendmae_visualize", *flags.split()])
    with pytest.raises(SystemExit) as end:
        visualize.main()
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out + shown.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-run {run} -o {out}", "name one CT"),
        ("-run {run} -i {ct} -d 901 -case a -o {out}", "name one CT"),
        ("-run {run} -d 901 -o {out}", "-d and -case go together"),
        ("-run {run} -i {ct} -o {ct}", "is a file; name a folder"),
        ("-run {run} -i {ct} -o {ct}/below", "is a file; name a folder"),
        ("-run {run} -i {ct} -o {out} -p nnUNetPlans", "-p goes with -d"),
        ("-run {run} -i {ct} -o {out} -spacing 0 1 1", "three numbers in mm"),
        ("-run {run} -i {ct} -o {out} -seed -1", "must be an integer of at least 0"),
        ("-run {out}/none -i {ct} -o {out}", "does not exist; name the folder"),
        ("-run {out} -i {ct} -o {out}", "has no sound checkpoint. Name the folder"),
        ("-run {run}/checkpoint_final.pth -i {ct} -o {out}", "is a checkpoint; name its folder"),
        ("-run {ct} -i {ct} -o {out}", "is not a file of plain tensors"),
        ("-run {run} -i {out}/none.nii.gz -o {out}", "none.nii.gz does not exist"),
        ("-run {run} -i {run}/config.json -o {out}", "no image: neither DICOM nor"),
        ("-run {run} -i {run} -o {out}", "a folder with 0 DICOM series"),
        ("-run {run} -i {mr} -o {out}", "not HU"),
        ("-run {run} -i {ct} -o {out} -voxel 1 2 999", "-voxel 1 2 999 is not in"),
    ],
)
def test_mistakes_are_told_in_one_line(
    flags: str,
    message: str,
    pretrained: Path,
    ct: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mr = tmp_path / "mr.nii.gz"
    sitk.WriteImage(
        sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype("u1")), str(mr)
    )
    values = {"run": pretrained.parent, "ct": ct, "out": tmp_path, "mr": mr}
    code, log = command(monkeypatch, capsys, flags.format(**values))
    assert code == 2, log
    lines = [line for line in log.splitlines() if not line.startswith("loading")]
    assert len(lines) == 1 and lines[0].startswith("hiendmae_visualize: error: ") and message in lines[0], log


def test_unfinished_run_needs_a_spacing(
    pretrained: Path, ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(pretrained.with_name("checkpoint_final.pth"), run / "checkpoint_latest.pth")
    code, log = command(monkeypatch, capsys, f"-run {run} -i {ct} -o {tmp_path / 'out'}")
    assert code == 2 and "does not record its spacing until it is finished; name one in mm" in log
    code, log = command(monkeypatch, capsys, f"-run {run} -i {ct} -o {tmp_path / 'out'} -spacing 9 9 9")
    assert code == 0, log
    assert sitk.ReadImage(str(tmp_path / "out" / "reconstruction.nii.gz")).GetSpacing() == pytest.approx(
        (9, 9, 9), rel=0.1
    )


def test_reconstruction_is_saved_where_it_belongs(tmp_path: Path, ct: Path) -> None:
    case = read_ct(ct, (11.0, 9.0, 7.0), DEFAULT_WINDOW)
    case.save(case.volume, tmp_path / "x.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "x.nii.gz"))
    original = sitk.Cast(sitk.ReadImage(str(ct)), sitk.sitkFloat32)
    there = sitk.Resample(original, image, sitk.Transform(), sitk.sitkLinear, -1000.0)
    there = sitk.Clamp(there, sitk.sitkFloat32, *DEFAULT_WINDOW)
    a, b = sitk.GetArrayFromImage(image)[1:-1, 1:-1, 1:-1], sitk.GetArrayFromImage(there)[1:-1, 1:-1, 1:-1]
    error = np.abs(a - b).mean()
    for axis in range(3):
        assert error < 0.5 * np.abs(np.roll(a, 1, axis) - b).mean()


def test_preprocessed_case_lies_where_the_raw_one_does(
    world: World, ct: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / kind))
    raw = read_ct(ct, source.spacings[0], source.window_hu)
    name = ct.name.removesuffix("_0000.nii.gz")
    stored = read_preprocessed("901", name, "nnUNetPlans", "3d_fullres", source.window_hu)
    assert stored.volume.shape == raw.volume.shape and stored.original_size == raw.original_size
    assert np.allclose(stored.frame.origin, raw.frame.origin) and np.allclose(stored.frame.spacing, raw.frame.spacing)
    inside = (raw.volume > 0.25) & (raw.volume < 0.9)  # the plans clip below
    assert np.abs(stored.volume - raw.volume)[inside].max() < 1e-3
    with pytest.raises(ValueError, match="-case nobody is not in"):
        read_preprocessed("901", "nobody", "nnUNetPlans", "3d_fullres", source.window_hu)


def test_rebuilding_depends_on_the_seed_alone(source: Source, ct: Path) -> None:
    assert source.model is not None
    volume = read_ct(ct, SPACING, source.window_hu).volume
    one, same, other = (reconstruct_volume(source.model, volume, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.rebuilt, same.rebuilt) and np.array_equal(one.masked, same.masked)
    assert not np.array_equal(one.masked, other.masked)
    assert np.array_equal(one.rebuilt[~one.masked], volume[~one.masked])
    assert np.array_equal(one.flat[~one.masked], volume[~one.masked])
    assert not np.array_equal(one.rebuilt[one.masked], one.flat[one.masked])


def test_maps_of_encoder_and_decoder(source: Source, ct: Path) -> None:
    assert source.model is not None
    case = read_ct(ct, SPACING, source.window_hu)
    voxel = case.voxel(None)
    assert case.volume[voxel] > 0
    start = crop_around(voxel, case.volume.shape, source.img_size)
    x = crop_at(case.volume, start, source.img_size)
    grid = source.model.config.grid
    token = token_of(voxel, start, source.model.config.patch_size, grid)
    for found in encoder_attention(source.encoder, x, token):
        assert found.weights.shape == grid and found.num_keys == 1 + np.prod(grid)
        assert found.weights.sum() + found.to_others == pytest.approx(1, abs=1e-5)
    for masks in (1, 9):
        maps = decoder_attention(source.model, x, token, seed=0, num_masks=masks)
        assert [found.layer for found in maps] == [3, 6, 9]
        assert all(np.isnan(found.weights.ravel()[token]) for found in maps)
    for found in decoder_attention(source.model, x, token, seed=0, num_masks=1):
        assert np.isfinite(found.weights).sum() == source.model.config.num_visible
        assert np.nansum(found.weights) + found.to_others == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("decoder", "layers"), [("last_layer", [11, 11, 11]), ("self_attention", [])])
def test_maps_of_the_decoder_controls(decoder: str, layers: list[int], source: Source) -> None:
    assert source.model is not None
    model = HiEndMAE(replace(source.model.config, decoder=decoder)).eval()
    maps = decoder_attention(model, torch.rand(1, 1, *source.img_size), token=5, seed=0, num_masks=2)
    assert [found.layer for found in maps] == layers


def test_pictures_of_a_primus(
    world: World, source: Source, ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With register tokens, which are keys and are not shown."""
    assert source.model is not None
    model = replace(
        source.model.config, kind="primus", embed_dim=24, num_heads=2, depth=4, taps=(1, 3), patch_size=(8, 8, 8),
        encoder_options={"num_register_tokens": 2},
    )  # fmt: skip
    run = RunConfig(datasets=(DATASET,), plans="nnUNetPlans", configuration="3d_fullres", model=model, steps=1,
                    batch_size=1)  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint(folder / FINAL, TrainState.create(run, torch.device("cpu")).to_dict(run))
    primus = open_source(folder, torch.device("cpu"))
    x, grid = torch.rand(1, 1, *model.img_size), model.grid
    for found in encoder_attention(primus.encoder, x, 7):
        assert found.weights.shape == grid and found.num_keys == 2 + np.prod(grid)
        assert 0 < found.to_others < 1 and found.weights.sum() + found.to_others == pytest.approx(1, abs=1e-5)
    assert primus.model is not None
    for found in decoder_attention(primus.model, x, 7, seed=0, num_masks=1):
        assert np.isfinite(found.weights).sum() == found.num_keys == model.num_visible
        assert found.to_others == 0 and np.nansum(found.weights) == pytest.approx(1, abs=1e-5)
    for kind in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / kind))
    case = ct.name.removesuffix("_0000.nii.gz")
    code, log = command(monkeypatch, capsys, f"-run {folder} -d 901 -case {case} -o {tmp_path / 'out'}")
    assert code == 0, log
    names = {"reconstruction.png", "attention.png", "features.png", "index.html", "reconstruction.nii.gz"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_features_of_a_ct(source: Source, ct: Path) -> None:
    case = read_ct(ct, SPACING, source.window_hu)
    config = source.encoder.config

    def look(encoder: torch.nn.Module) -> list[np.ndarray]:
        tokens = encode_volume(encoder, case.volume, source.img_size, TISSUE_MARGIN)  # type: ignore[arg-type]
        found = colours(tokens, config.taps, case.volume.shape, source.img_size, config.patch_size)
        assert [f.layer for f in found] == list(config.taps)
        return [f.rgb for f in found]

    trained, again, random = look(source.encoder), look(source.encoder), look(untrained(source.encoder, 0))
    for a, b, c in zip(trained, again, random, strict=True):
        assert np.array_equal(a, b) and not np.array_equal(a, c)
        assert np.array_equal(a.any(-1), c.any(-1)) and 0.1 < a.any(-1).mean() < 1
