"""``-init``: what a pre-training takes over from a file, what it makes fit, what it leaves fresh, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATASET, World
from test_import_weights import CONFIG as AUTHORS
from test_import_weights import official_state

from nnunetv2_hiendmae.architectures import interpolate_pos_embed
from nnunetv2_hiendmae.architectures.patch_resize import enlarging, resize_patch_embed
from nnunetv2_hiendmae.weights.file import load_weights, save_weights
from nnunetv2_hiendmae.weights.model_card import model_card
from nnunetv2_hiendmae.weights.official import import_official
from pretraining import HiEndMAE, ModelConfig
from pretraining.checkpoint import FINAL, positions_of
from pretraining.config import RunConfig, plain
from pretraining.initialise import check_origin, lines_of, open_origin, origin_of_file, start_from

VIT = ModelConfig(
    img_size=(16, 24, 8), patch_size=(8, 8, 4), in_channels=1, embed_dim=24, depth=4, num_heads=2, mlp_ratio=2.0,
    taps=(1, 2), mask_ratio=0.5, decoder_embed_dim=12, decoder_num_heads=2, decoder_self_depth=1,
)  # fmt: skip
PRIMUS = replace(VIT, kind="primus", encoder_options={"num_register_tokens": 2})


def run_config(model: ModelConfig, **changes: Any) -> RunConfig:
    return RunConfig(
        datasets=("Dataset1_X",), plans="p", configuration="c", model=model, steps=5, batch_size=1, **changes
    )


def run_of(folder: Path, model: ModelConfig) -> HiEndMAE:
    """A run's folder with a checkpoint of random weights, all of them other than a fresh model's."""
    torch.manual_seed(3)
    mae = HiEndMAE(model)
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    state = {"optimizer_state": {}, "grad_scaler_state": {}, "step": 5, "config": run_config(model).to_dict()}
    folder.mkdir(exist_ok=True)
    torch.save({"network_weights": mae.state_dict(), **state}, folder / FINAL)
    return mae


def started(path: Path, model: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a model that started from a file, and the first entry of its ancestry."""
    torch.manual_seed(7)
    mae = HiEndMAE(model)
    origin = open_origin(path)
    check_origin(origin, run_config(model))
    ancestry = start_from(mae, origin)
    assert json.loads(json.dumps(ancestry)) == ancestry
    return mae.state_dict(), ancestry[0]


@pytest.mark.parametrize("model", [VIT, PRIMUS], ids=["vit", "primus"])
def test_a_whole_run_goes_on_with_its_decoder(tmp_path, model) -> None:
    mae = run_of(tmp_path / "run", model)
    for path in (tmp_path / "run", tmp_path / "run" / FINAL):
        state, ancestry = started(path, model)
        assert all(torch.equal(state[k], v) for k, v in mae.state_dict().items())
        assert ancestry["fresh"] == ancestry["dropped"] == [] and ancestry["resized"] == {}
        assert "after 5 of 5 steps" in ancestry["form"] and ancestry["datasets"] == [
            {"name": "Dataset1_X", "cases": None}
        ]


@pytest.mark.parametrize("model", [VIT, PRIMUS], ids=["vit", "primus"])
def test_other_crop_channels_and_tokens(tmp_path, model) -> None:
    mae = run_of(tmp_path / "run", model).state_dict()
    other = replace(model, img_size=(12, 12, 24), patch_size=(4, 6, 8), in_channels=2)
    state, ancestry = started(tmp_path / "run", other)
    stem, lpe = "encoder." + model.encoder.stem, "encoder." + model.encoder.positions
    shared = resize_patch_embed(mae[f"{stem}.weight"].expand(-1, 2, -1, -1, -1) / 2, (4, 6, 8))[0]
    torch.testing.assert_close(state[f"{stem}.weight"], shared)
    assert {k for k in state if k.startswith("decoder.head")} == set(ancestry["fresh"])
    assert "spread from 1 to 2 channels; tokens of 8 × 8 × 4 to 4 × 6 × 8 voxels" in "".join(lines_of(ancestry))
    if model.kind == "primus":
        torch.testing.assert_close(state[lpe], interpolate_pos_embed(mae[lpe], (2, 3, 2), (3, 2, 3)))
        assert torch.equal(state[lpe][:, :2], mae[lpe][:, :2])
    same = set(state) - set(ancestry["fresh"]) - {f"{stem}.weight", lpe}
    assert len(same) > 50 and all(torch.equal(state[k], mae[k]) for k in same)


@pytest.mark.parametrize("model", [VIT, PRIMUS], ids=["vit", "primus"])
@pytest.mark.parametrize("changes", [{"taps": (0, 3)}, {"decoder": "last_layer"}, {"decoder_num_heads": 1},
                                     {"decoder_embed_dim": 18, "decoder_num_heads": 3}])  # fmt: skip
def test_another_decoder_is_fresh_as_a_whole(tmp_path, model, changes) -> None:
    mae = run_of(tmp_path / "run", model).state_dict()
    state, ancestry = started(tmp_path / "run", replace(model, **changes))
    torch.manual_seed(7)
    fresh = HiEndMAE(replace(model, **changes)).state_dict()
    for key, value in state.items():
        assert torch.equal(value, mae[key] if key.startswith("encoder.") else fresh[key]), key
    assert ancestry["fresh"] == sorted(k for k in state if not k.startswith("encoder."))


@pytest.mark.parametrize("model", [VIT, PRIMUS], ids=["vit", "primus"])
def test_encoder_weights_and_their_ancestry(tmp_path, model) -> None:
    mae = HiEndMAE(model)
    header = {
        "architecture": model.encoder.to_dict(), "window_hu": [-175, 250], "img_size": plain(model.img_size),
        "datasets": [{"name": "Dataset2_Y", "cases": 9}], "licence": "CC-BY 4.0", "ancestry": [{"file": "first.pth"}],
        **positions_of(mae),
    }  # fmt: skip
    sha256 = save_weights(tmp_path / "w.pth", mae.encoder.state_dict(), header)
    state, ancestry = started(tmp_path / "w.pth", model)
    assert all(torch.equal(state["encoder." + k], v) for k, v in mae.encoder.state_dict().items())
    assert (ancestry["sha256"], ancestry["licence"], ancestry["file"]) == (sha256, "CC-BY 4.0", "w.pth")
    grown = start_from(HiEndMAE(model), open_origin(tmp_path / "w.pth"))
    assert [a["file"] for a in grown] == ["w.pth", "first.pth"]
    full = {**header, "ancestry": grown[:1]}
    save_weights(tmp_path / "v.pth", mae.encoder.state_dict(), full)
    assert "| w.pth | a Hi-End-MAE weights file | Dataset2_Y | CC-BY 4.0 |" in model_card(
        load_weights(tmp_path / "v.pth"), "a/b", "other"
    )


def test_the_authors_file_brings_its_decoder(tmp_path) -> None:
    state = official_state(AUTHORS)
    origin = origin_of_file(tmp_path / "authors.pth", import_official(state, num_heads=2))
    mae = HiEndMAE(AUTHORS)
    (ancestry,) = start_from(mae, origin)
    assert all(torch.equal(v, state[k]) for k, v in mae.state_dict().items())
    assert ancestry["fresh"] == ancestry["dropped"] == [] and "authors' Hi-End-MAE checkpoint" in ancestry["form"]
    other = HiEndMAE(replace(AUTHORS, decoder="last_layer"))
    (ancestry,) = start_from(other, origin)
    assert "decoder (" in lines_of(ancestry)[2] and not any(k.startswith("encoder.") for k in ancestry["fresh"])
    torch.save(state, tmp_path / "authors.pth")
    with pytest.raises(ValueError, match=r"24 is no published width.* hiendmae_import_weights can be told"):
        open_origin(tmp_path / "authors.pth")


def test_refusals(tmp_path) -> None:
    run_of(tmp_path / "run", VIT)
    origin = open_origin(tmp_path / "run")
    for model, message in (
        (replace(VIT, depth=5), "another encoder: depth is 4 in the file, 5 in the run"),
        (replace(VIT, kind="primus"), "kind is vit in the file, primus in the run"),
    ):
        with pytest.raises(ValueError, match=message):
            check_origin(origin, run_config(model))
    with pytest.raises(ValueError, match=r"trained on -175 to 250 HU, the run has 0 to 80\. Add -window_hu -175 250"):
        check_origin(origin, run_config(VIT, window_hu=(0.0, 80.0)))
    with pytest.raises(ValueError, match="does not exist"):
        open_origin(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Name a folder with checkpoints, or a file of weights"):
        open_origin(tmp_path / "empty")


@pytest.mark.parametrize(("old", "new"), [((2, 3, 2), (4, 3, 6)), ((4, 4, 4), (2, 3, 4)), ((3, 3, 3), (3, 3, 3))])
def test_a_resized_patch_embedding_gives_the_tokens_of_the_old_one(old, new) -> None:
    weight, patch = torch.randn(5, 2, *old), torch.randn(2, *old)
    resized, lost = resize_patch_embed(weight, new)
    matrices = [enlarging(a, b) for a, b in zip(old, new, strict=True)]
    larger = torch.einsum("cxyz,ax,by,dz->cabd", patch.double(), *matrices)
    tokens, expected = (
        torch.einsum("ecxyz,cxyz->e", w.double(), p.double()) for w, p in ((resized, larger), (weight, patch))
    )
    if all(b >= a for a, b in zip(old, new, strict=True)):
        assert lost < 1e-6
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    else:  # as near as can be: no other weight is nearer
        assert 0.05 < lost < 1
        flat = torch.kron(torch.kron(enlarging(4, 2), enlarging(4, 3)), enlarging(4, 4))
        best = torch.linalg.lstsq(flat.T, weight.double().flatten(2).permute(2, 0, 1).flatten(1)).solution
        torch.testing.assert_close(resized.double().flatten(2).permute(2, 0, 1).flatten(1), best, rtol=1e-4, atol=1e-5)


def test_the_command(world: World, pretrained: Path) -> None:
    """A run starts from weights of another crop, says so, and hands its ancestry on."""
    flags = (
        "-d 901 -preset tiny -device cpu -batch_size 2 -crop_size 24 24 24 -num_workers 0 -preview_epochs 0 -run next"
    )
    start = f"hiendmae_pretrain {flags} -steps 2 -init {pretrained}"
    out = world.run(start)
    assert "Started from encoder_weights.pth: a Hi-End-MAE weights file; sha256" in out and "resized: none" in out
    folder = world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres" / "next"
    header = load_weights(folder / "encoder_weights.pth").header
    (ancestry,) = header["ancestry"]
    assert ancestry["sha256"] == load_weights(pretrained).sha256 and ancestry["datasets"][0]["cases"] == 6
    assert "started from" in header["licence"]
    refused = world.run(
        f"hiendmae_pretrain {flags} -steps 2 -init {pretrained}x -run other".replace("-run next ", ""), ok=False
    )
    assert "does not exist" in refused and not (folder.parent / "other").exists()
