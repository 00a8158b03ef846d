"""Primus weights to and from nnU-Net and nnssl: what others' loaders get is what our encoder computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures import primus as stock
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.architectures import ENCODERS, HiEndMAEUNETR, PrimusConfig, PrimusEncoder
from nnunetv2_hiendmae.commands import import_weights
from nnunetv2_hiendmae.intensity import CanonicalIntensity, plan_intensities
from nnunetv2_hiendmae.weights.file import State, Weights, load_encoder, load_tensors, load_weights, save_weights
from nnunetv2_hiendmae.weights.nnssl import PLAN, to_nnssl
from nnunetv2_hiendmae.weights.nnunet import to_nnunet

WINDOW = (-175.0, 250.0)
SMALL = PrimusConfig(patch_size=(8, 8, 4), embed_dim=48, depth=4, num_heads=4, taps=(1, 2, 3))
CT = {"mean": 30.0, "std": 80.0, "percentile_00_5": -1000.0, "percentile_99_5": 900.0, "median": 20.0, "min": -1024.0,
      "max": 2000.0}  # fmt: skip
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset901_X",
    "plans_name": "nnUNetPlans",
    "configurations": {
        "3d_fullres": {
            "patch_size": [24, 16, 16], "spacing": [1.5, 1.5, 1.5], "normalization_schemes": ["CTNormalization"],
            "architecture": {},
        }
    },
    "foreground_intensity_properties_per_channel": {"0": CT},
}  # fmt: skip
DATASET_JSON = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}


def weights_of(config: PrimusConfig, grid: tuple[int, int, int] = (2, 3, 2), **header: Any) -> Weights:
    """Random weights as a pre-training exports them."""
    torch.manual_seed(0)
    encoder = config.build(grid)
    with torch.no_grad():
        encoder.eva.pos_embed.normal_()
        encoder.down_projection.proj.bias.normal_()
    img_size = [g * p for g, p in zip(grid, config.patch_size, strict=True)]
    header = {
        "architecture": config.to_dict(), "pos_embed": "learned", "pos_embed_grid": list(grid), "img_size": img_size,
        "window_hu": list(WINDOW), "spacing": {"X": [1.5, 1.5, 1.5]}, "datasets": [{"name": "X", "cases": 3}], **header,
    }  # fmt: skip
    return Weights(Path("w.pth"), encoder.state_dict(), header)


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["hiendmae_import_weights", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        import_weights.main()
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


def tokens_for_the_decoder(network: stock.Primus, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = network.up_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network.eval()(x)
    hook.remove()
    return seen[0].flatten(2).transpose(1, 2)


def test_nnunets_trainer_starts_from_our_file(tmp_path) -> None:
    """Its own loader takes the file, and its network computes our features from images in the plans' domain."""
    weights = weights_of(ENCODERS["primus_s"])
    checkpoint, lines = to_nnunet(weights, PLANS, "3d_fullres", DATASET_JSON)
    torch.save(checkpoint, tmp_path / "start.pth")
    assert "nnUNet_Primus_S_Trainer" in lines[0] and "interpolated from 2 × 3 × 2 to 3 × 2 × 2 tokens" in lines[1]
    plans = PlansManager(PLANS)
    theirs = nnUNet_Primus_S_Trainer.build_network_architecture(plans, plans.get_configuration("3d_fullres"), 1, 3)
    load_pretrained_weights(theirs, tmp_path / "start.pth")

    channels = plan_intensities(PLANS, PLANS["configurations"]["3d_fullres"], WINDOW)
    ours = ENCODERS["primus_s"].build((3, 2, 2), pretraining=False).eval()
    load_encoder(ours, weights, 1)
    hu = torch.rand(1, 1, 24, 16, 16) * (WINDOW[1] - WINDOW[0]) + WINDOW[0]
    x = (hu - CT["mean"]) / CT["std"]
    with torch.no_grad():
        expected = ours(CanonicalIntensity(channels)(x))[1]
    assert expected.std() > 0.1
    torch.testing.assert_close(tokens_for_the_decoder(theirs, x), expected, rtol=0, atol=2e-4)
    again = checkpoint["network_weights"]
    assert all(torch.equal(again[k], v) for k, v in ours.state_dict().items() if not k.startswith("down_projection"))


@pytest.mark.parametrize(
    ("config", "patch", "message"),
    [
        (SMALL, [24, 16, 16], "none for this encoder of kind 'primus'"),
        (ENCODERS["tiny"], [24, 16, 16], "none for this encoder of kind 'vit'"),
        (ENCODERS["primus_s"], [20, 16, 16], r"divisible by \(8, 8, 8\); the plans have \[20, 16, 16\]"),
    ],
)
def test_plans_and_encoders_that_nnunet_cannot_train(config, patch, message) -> None:
    plan = {**PLANS["configurations"]["3d_fullres"], "patch_size": patch}
    weights = Weights(Path("w.pth"), {}, {"architecture": config.to_dict(), "window_hu": list(WINDOW)})
    with pytest.raises(ValueError, match=message):
        to_nnunet(weights, {**PLANS, "configurations": {"3d_fullres": plan}}, "3d_fullres", DATASET_JSON)


def test_by_the_rules_of_nnunets_pre_trained_path() -> None:
    """Its loader's rules: strict loads of encoder and stem by the plan's keys, one position embedding."""
    weights = weights_of(ENCODERS["primus_s"])
    file = to_nnssl(weights.encoder, weights.header)
    plan, tensors = file[PLAN], file["network_weights"]
    assert plan["architecture_plans"]["arch_class_name"] == "PrimusS"
    network = stock.PrimusS(1, 3, (8, 8, 8), tuple(plan["recommended_downstream_patchsize"]))
    for key in ("key_to_encoder", "key_to_stem", "key_to_lpe"):
        assert plan[key] == getattr(network, key)
    assert tuple(plan["keys_to_in_proj"]) == network.keys_to_in_proj
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {k.replace(key, "").removeprefix("."): v for k, v in tensors.items() if k.startswith(key)}
        network.get_submodule(key).load_state_dict(part)
    (lpe,) = [v for k, v in tensors.items() if k.startswith(plan["key_to_lpe"])]
    network.get_parameter(plan["key_to_lpe"]).data = lpe
    x = torch.rand(1, 1, 16, 24, 16)
    ours = ENCODERS["primus_s"].build((2, 3, 2), pretraining=False).eval()
    load_encoder(ours, weights, 1)
    with torch.no_grad():
        torch.testing.assert_close(tokens_for_the_decoder(network, x), ours(x)[1], rtol=0, atol=1e-5)


def foreign(config: PrimusConfig = SMALL, prefix: str = "", **changes: Any) -> tuple[PrimusEncoder, State]:
    """An encoder, and a whole Primus of another program around it."""
    encoder = config.build((2, 2, 2))
    torch.nn.init.normal_(encoder.eva.pos_embed)
    rest = {"up_projection.decode.0.weight": torch.zeros(3), "mask_token": torch.zeros(1, 1, 48),
            "decoder.blocks.0.norm1.weight": torch.zeros(48)}  # fmt: skip
    return encoder, {prefix + key: value for key, value in {**encoder.state_dict(), **rest, **changes}.items()}


def nnssl_plan(**changes: Any) -> dict[str, Any]:
    configuration = {"patch_size": [16, 16, 8], "spacing": [1, 1, 1], "normalization_schemes": ["ZScoreNormalization"]}
    return {
        "architecture_plans": {"arch_class_name": "PrimusM", "arch_kwargs": None},
        "pretrain_plan": {"dataset_name": "Dataset745_OpenMind", "configurations": {"onemmiso": configuration}},
        "pretrain_num_input_channels": 1, "recommended_downstream_patchsize": [16, 16, 8], "key_to_encoder": "eva",
        "key_to_stem": "down_projection", "keys_to_in_proj": ["down_projection.proj"], "key_to_lpe": "eva.pos_embed",
        **changes,
    }  # fmt: skip


FORMS = {
    "nnssl": lambda state: {"network_weights": state, PLAN: nnssl_plan(), "trainer_name": "BaseEvaMAETrainer",
                            "citations": ["Wald et al."]},
    "nnU-Net's": lambda state: {  # with numbers of numpy, as nnUNetTrainer.save_checkpoint writes them
        "network_weights": state, "trainer_name": "nnUNet_Primus_M_Trainer", "_best_ema": np.float64(0.5),
        "logging": {"mean_fg_dice": [np.float64(0.1), np.float32(0.2)], "lrs": [0.01]}, "current_epoch": np.int64(3),
    },
    "state dict": lambda state: state,
    "wrapped": lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "part of another model": lambda state: {"network_weights": {f"student.{k}": v for k, v in state.items()}},
    "with a plan's own keys": lambda state: {
        "network_weights": {f"{part}.{k}": v for part in ("teacher", "student") for k, v in state.items()},
        PLAN: nnssl_plan(key_to_encoder="student.eva", key_to_stem="student.down_projection",
                         key_to_lpe="student.eva.pos_embed"),
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("changes", [{"num_register_tokens": 3}, {"init_values": None, "scale_attn_inner": False}])
def test_primus_of_other_programs(tmp_path, monkeypatch, capsys, form, changes) -> None:
    config = PrimusConfig.from_dict({**SMALL.to_dict(), "mlp_ratio": 2.3, **changes})
    encoder, state = foreign(config)
    torch.save(form(state), tmp_path / "theirs.pth")
    args = (tmp_path / "theirs.pth", "-o", tmp_path / "w.pth", "-num_heads", 4)
    code, out, err = run(monkeypatch, capsys, *args)
    assert (code, err) == (0, "") and "its first layers have to adapt" in out
    weights = load_weights(tmp_path / "w.pth")
    assert set(weights.encoder) == set(encoder.state_dict())
    ours = weights.architecture.build((2, 2, 2), pretraining=False)
    assert isinstance(ours, PrimusEncoder) and ours.config.num_register_tokens == config.num_register_tokens
    load_encoder(ours, weights, 1)
    x = torch.rand(1, 1, 16, 16, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[1], encoder(x)[1])
    if "nnssl_adaptation_plan" in form(state):
        assert weights.header["datasets"][0]["name"] == "Dataset745_OpenMind" and "ZScoreNormalization" in out


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (lambda: foreign()[1], [], "48 is no width of nnU-Net's Primus; say -num_heads"),
        (lambda: foreign()[1], ["-num_heads", 4, "-img_size", 16, 16, 16], "is no 2 × 2 × 4 grid; say -img_size"),
        (lambda: foreign(**{"eva.blocks.1.norm1.weight": torch.zeros(7)})[1], ["-num_heads", 4],
         "eva.blocks.1.norm1.weight (7,) instead of (48,)"),
        (lambda: foreign(**{"eva.blocks.1.extra.weight": torch.zeros(7)})[1], ["-num_heads", 4],
         "eva.blocks.1.extra.weight unexpected"),
        (lambda: {k.replace("down_projection.proj", "down_projection.stem.0"): v for k, v in foreign()[1].items()}, [],
         "PrimusV2 and V3 have other stems"),
        (lambda: {f"{p}.{k}": v for p in "ab" for k, v in foreign()[1].items()}, [], "encoders a.eva, b.eva"),
        (lambda: {"network_weights": foreign()[1], PLAN: nnssl_plan(key_to_encoder="vit")}, [], "its plan names 'vit'"),
        (lambda: {"network_weights": foreign()[1], PLAN: ["eva"]}, ["-num_heads", 4], "no sound Primus checkpoint"),
        (lambda: foreign(**{"eva.norm.weight": torch.full((48,), torch.nan)})[1], ["-num_heads", 4],
         "eva.norm.weight holds values that are not finite"),
        (lambda: foreign(**{"eva.pos_embed": torch.zeros(8)})[1], ["-num_heads", 4], "no sound Primus checkpoint"),
        (lambda: foreign()[1], ["-num_heads", 0], "num_heads"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(tmp_path, monkeypatch, capsys, content, flags, message) -> None:
    torch.save(content(), tmp_path / "theirs.pth")
    code, _, err = run(monkeypatch, capsys, tmp_path / "theirs.pth", "-o", tmp_path / "w.pth", *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.pth"]


def test_to_nnssl_and_back(tmp_path, monkeypatch, capsys) -> None:
    weights = weights_of(SMALL)
    save_weights(tmp_path / "w.pth", weights.encoder, weights.header)
    assert run(monkeypatch, capsys, tmp_path / "w.pth", "-o", tmp_path / "n.pth", "--nnssl")[0] == 0
    kwargs = torch.load(tmp_path / "n.pth")[PLAN]["architecture_plans"]["arch_kwargs"]
    stock.Primus(1, num_classes=2, input_shape=(16, 24, 8), **kwargs)
    assert run(monkeypatch, capsys, tmp_path / "n.pth", "-o", tmp_path / "back.pth")[0] == 0
    back = load_weights(tmp_path / "back.pth")
    assert back.architecture == SMALL and all(torch.equal(back.encoder[k], v) for k, v in weights.encoder.items())
    damaged = torch.load(tmp_path / "n.pth")
    damaged["hiendmae_header"]["architecture"]["depth"] = 9
    torch.save(damaged, tmp_path / "n.pth")
    code, _, err = run(monkeypatch, capsys, tmp_path / "n.pth", "-o", tmp_path / "x.pth")
    assert code == 2 and "its header and its tensors are of different architectures" in err and err.count("\n") == 1
    damaged["hiendmae_header"] = {"architecture": None}
    torch.save(damaged, tmp_path / "n.pth")
    code, _, err = run(monkeypatch, capsys, tmp_path / "n.pth", "-o", tmp_path / "x.pth")
    assert code == 2 and "no sound nnssl-style checkpoint" in err and err.count("\n") == 1


def test_the_command_for_nnunet(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "Dataset901_X"
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    monkeypatch.setattr(import_weights, "preprocessed_folder", lambda _: folder)
    weights = weights_of(ENCODERS["primus_s"])
    save_weights(tmp_path / "w.pth", weights.encoder, weights.header)
    code, out, _ = run(monkeypatch, capsys, tmp_path / "w.pth", "-o", tmp_path / "s.pth", "--nnunet", "-d", 901)
    assert code == 0 and f"-tr nnUNet_Primus_S_Trainer -pretrained_weights {tmp_path / 's.pth'}" in out
    assert any(k.startswith("up_projection.") for k in torch.load(tmp_path / "s.pth")["network_weights"])
    code, _, err = run(monkeypatch, capsys, tmp_path / "w.pth", "-o", tmp_path / "x.pth", "--nnunet")
    assert code == 2 and "--nnunet needs -d DATASET" in err


def test_fine_tuning_networks_of_other_grids_and_channels() -> None:
    weights = weights_of(SMALL)
    network = HiEndMAEUNETR(SMALL, input_channels=2, num_classes=2, img_size=(24, 16, 12), feature_size=2)
    report = load_encoder(network.vit, weights, 2)
    assert report.fresh == report.dropped == []
    assert report.resized == {
        "eva.pos_embed": "interpolated from 2 × 3 × 2 to 3 × 2 × 3 tokens",
        "down_projection.proj.weight": "spread from 1 to 2 channels",
    }


def test_numbers_of_an_older_numpy(tmp_path) -> None:
    """A checkpoint that nnU-Net wrote under numpy 1 names another module; still nothing but numbers is unpickled."""
    file = tmp_path / "old.pth"
    torch.save({"_best_ema": np.float64(0.5)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        file.write_bytes(content.replace(b"numpy._core.multiarray", core).replace(b"numpy.core.multiarray", core))
        assert load_tensors(file) == {"_best_ema": 0.5}
