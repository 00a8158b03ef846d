"""``hiendmae_import_weights``: what it takes, what it makes of it, what it refuses and how it says so."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import golden
import pytest
import torch
from golden import needs_golden

from nnunetv2_hiendmae.architectures import ENCODERS, HiEndMAEUNETR, ViT, ViTConfig, sincos_pos_embed
from nnunetv2_hiendmae.commands import import_weights
from nnunetv2_hiendmae.weights.file import load_encoder, load_weights
from nnunetv2_hiendmae.weights.nnssl import PLAN
from nnunetv2_hiendmae.weights.official import convert_official, import_official, sincos_grid
from pretraining import HiEndMAE, ModelConfig

CONFIG = ModelConfig(
    img_size=(16, 24, 8),
    patch_size=(8, 8, 4),
    in_channels=1,
    embed_dim=24,
    depth=10,
    num_heads=2,
    mlp_ratio=4.0,
    taps=(3, 6, 9),
    mask_ratio=0.5,
    decoder_embed_dim=12,
    decoder_num_heads=1,
    decoder_self_depth=1,
)


def official_state(config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    """A state dict as the authors' model of this configuration has it."""
    state = dict(HiEndMAE(config).state_dict())
    state["encoder_pos_embed"] = sincos_pos_embed(config.embed_dim, config.grid)[None]
    state["decoder_pos_embed"] = sincos_pos_embed(config.decoder_embed_dim, config.grid)[None]
    return state


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command."""
    monkeypatch.setattr(sys, "argv", ["hiendmae_import_weights", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        import_weights.main()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
@pytest.mark.parametrize("wrapped", [True, False])
def test_any_wrapper(tmp_path, monkeypatch, capsys, prefix, wrapped):
    state = official_state()
    named = {prefix + key: value for key, value in state.items()}
    torch.save({"epoch": 200, "state_dict": named} if wrapped else named, tmp_path / "official.pth")
    code, out, err = run(monkeypatch, capsys, tmp_path / "official.pth", "-o", tmp_path / "w.pth", "-num_heads", 2)
    assert (code, err) == (0, "")
    weights = load_weights(tmp_path / "w.pth")
    expected = {key.removeprefix("encoder."): v for key, v in state.items() if key.startswith("encoder.")}
    assert set(weights.encoder) == set(expected) == set(ViT(CONFIG.encoder, CONFIG.grid, class_token=True).state_dict())
    assert all(torch.equal(weights.encoder[key], value) for key, value in expected.items())
    assert weights.architecture == CONFIG.encoder
    assert weights.header["pos_embed_grid"] == [2, 3, 2] and weights.header["img_size"] == [16, 24, 8]
    assert weights.header["epochs"] == (200 if wrapped else None)
    assert weights.window_hu == (-175.0, 250.0)
    assert weights.header["citation"] and weights.header["licence"]
    assert f"Used: {len(expected)} tensors" in out
    assert "Dropped: decoder_pos_embed, encoder_pos_embed, mask_token, decoder.* (" in out
    assert "Fresh: none of the encoder" in out and weights.sha256 in out


def test_released_architecture_names_its_data():
    """What the header says of the released weights, without 1.4 GB of them."""
    with torch.device("meta"):
        mae = HiEndMAE(
            ModelConfig(
                **{**ENCODERS["large_p12"].to_dict(), "in_channels": 1}, img_size=(96, 96, 96), mask_ratio=0.75,
                decoder_embed_dim=528, decoder_num_heads=16, decoder_self_depth=2,
            )
        )  # fmt: skip
    state = dict(mae.state_dict())
    state["encoder_pos_embed"] = sincos_pos_embed(1536, (8, 8, 8))[None]
    state["decoder_pos_embed"] = sincos_pos_embed(528, (8, 8, 8))[None]
    header = import_official(state).header
    assert ViTConfig.from_dict(header["architecture"]) == ENCODERS["large_p12"]
    assert header["img_size"] == [96, 96, 96] and header["window_hu"] == [-175.0, 250.0]
    assert header["spacing"] == {"10K CT (authors)": [1.5, 1.5, 1.5]}


@needs_golden
@pytest.mark.parametrize("name", golden.NAMES)
def test_authors_own_file_gives_their_features(name, tmp_path, monkeypatch, capsys):
    heads = golden.settings(name)["enc"]["num_heads"]
    source = golden.FOLDER / f"{name}_ckpt.pth"
    assert run(monkeypatch, capsys, source, "-o", tmp_path / "w.pth", "-num_heads", heads)[0] == 0
    weights = load_weights(tmp_path / "w.pth")
    vit = ViT(weights.architecture, (3, 3, 3), class_token=False, learned_pos_embed=True)
    report = load_encoder(vit, weights, 1)
    assert report.dropped == ["cls_token"] and report.fresh == ["pos_embed (sine-cosine)"]
    expected = convert_official(golden.checkpoint(name))
    for key, value in vit.state_dict().items():
        if key != "pos_embed":
            assert torch.equal(value, expected[f"encoder.{key}"]), key


def test_missing_and_unexpected_keys_are_named(tmp_path, monkeypatch, capsys):
    state = official_state()
    del state["encoder.blocks.2.mlp.fc1.bias"]
    state["encoder.blocks.2.mlp.gate.bias"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    code, out, err = run(monkeypatch, capsys, tmp_path / "other.pth", "-o", tmp_path / "w.pth", "-num_heads", 2)
    assert (code, out) == (2, "") and not (tmp_path / "w.pth").exists()
    assert err == (
        "hiendmae_import_weights: error: Not a checkpoint of the authors' Hi-End-MAE pre-training: 1 keys missing "
        "(encoder.blocks.2.mlp.fc1.bias), 1 unexpected (encoder.blocks.2.mlp.gate.bias).\n"
    )


def broken_shape() -> dict[str, torch.Tensor]:
    return {**official_state(), "encoder.blocks.1.attn.qkv.weight": torch.zeros(7, 24)}


def five_crosses() -> dict[str, torch.Tensor]:
    return official_state(replace(CONFIG, taps=(1, 3, 5, 7, 9)))


def named_twice() -> dict[str, torch.Tensor]:
    state = official_state()
    return {**state, "module.mask_token": state["mask_token"]}


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (official_state, [], "24 is no published width; say -num_heads"),
        (official_state, ["-num_heads", 5], "embed_dim=24 must be divisible by 6 and by -num_heads 5"),
        (official_state, ["-num_heads", 2, "-window_hu", 250, -175], "-window_hu (250.0, -175.0) is empty"),
        (broken_shape, ["-num_heads", 2], r"blocks.1.attn.qkv.weight (7, 24) instead of (72, 24)"),
        (five_crosses, ["-num_heads", 2], "has 5 cross-attention blocks"),
        (named_twice, ["-num_heads", 2], "names tensors twice"),
        (lambda: {**official_state(), "mask_token": 3}, ["-num_heads", 2], "no floating-point tensors: mask_token"),
        (lambda: [1, 2], [], "holds no dict of named tensors"),
        (lambda: {"state_dict": torch.nn.Linear(2, 2)}, [], "it holds objects of torch.nn.modules.linear.Linear"),
        (lambda: {"network_weights": {}, "step": 3, "config": {}}, [], "is a checkpoint of hiendmae_pretrain. Take"),
        (lambda: {"network_weights": {}, PLAN: [1]}, [], "is no sound nnssl checkpoint"),
        (lambda: {"network_weights": {}, PLAN: {"architecture_plans": {"arch_class_name": "ResEncL"}}}, [],
         "holds the architecture 'ResEncL', which is not a Hi-End-MAE ViT"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(tmp_path, monkeypatch, capsys, content, flags, message):
    torch.save(content(), tmp_path / "source.pth")
    code, _, err = run(monkeypatch, capsys, tmp_path / "source.pth", "-o", tmp_path / "w.pth", *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.pth"]


def test_files_that_are_none(tmp_path, monkeypatch, capsys):
    torch.save(official_state(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not weights")
    for name, message in (("absent", "does not exist"), ("cut", "damaged"), ("text", "not a file of plain tensors")):
        code, _, err = run(monkeypatch, capsys, tmp_path / f"{name}.pth", "-o", tmp_path / "w.pth", "-num_heads", 2)
        assert code == 2 and message in err and err.count("\n") == 1, name
    code, _, err = run(monkeypatch, capsys, tmp_path / "whole.pth", "-o", tmp_path / "whole.pth", "-num_heads", 2)
    assert code == 2 and "is the source itself" in err
    code, _, err = run(monkeypatch, capsys, tmp_path / "whole.pth", "-o", tmp_path / "no" / "w.pth", "-num_heads", 2)
    assert code == 2 and "folder" in err


def test_torchs_old_file_format(tmp_path, monkeypatch, capsys):
    torch.save(official_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert run(monkeypatch, capsys, tmp_path / "old.pth", "-o", tmp_path / "w.pth", "-num_heads", 2)[0] == 0
    assert load_weights(tmp_path / "w.pth").architecture == CONFIG.encoder


def test_another_window_is_recorded(tmp_path, monkeypatch, capsys):
    torch.save(official_state(), tmp_path / "o.pth")
    args = (tmp_path / "o.pth", "-o", tmp_path / "w.pth", "-num_heads", 2, "-window_hu", -1000, 400)
    assert run(monkeypatch, capsys, *args)[0] == 0
    assert load_weights(tmp_path / "w.pth").window_hu == (-1000.0, 400.0)


def test_learned_position_embedding_keeps_its_grid(tmp_path, monkeypatch, capsys):
    state = official_state()
    learned = torch.randn_like(state["encoder_pos_embed"])
    torch.save({**state, "encoder_pos_embed": learned}, tmp_path / "o.pth")
    args = (tmp_path / "o.pth", "-o", tmp_path / "w.pth", "-num_heads", 2)
    code, _, err = run(monkeypatch, capsys, *args)
    assert code == 2 and "12 tokens, which is no 2 × 2 × 2 grid; say -img_size" in err
    code, out, _ = run(monkeypatch, capsys, *args, "-img_size", 16, 24, 8)
    assert code == 0 and "learned and kept" in out
    weights = load_weights(tmp_path / "w.pth")
    same = ViT(CONFIG.encoder, (2, 3, 2), class_token=False, learned_pos_embed=True)
    load_encoder(same, weights, 1)
    assert torch.equal(same.pos_embed, learned)
    larger = ViT(CONFIG.encoder, (4, 3, 2), class_token=False, learned_pos_embed=True)
    assert "pos_embed" in load_encoder(larger, weights, 1).used
    corner = larger.pos_embed.detach().reshape(4, 3, 2, -1)[0]  # linear interpolation keeps the border planes
    torch.testing.assert_close(corner, learned.reshape(2, 3, 2, -1)[0])


@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 5, 2), (3, 1, 2), (4, 2, 1), (1, 1, 7), (6, 6, 6)])
def test_grid_of_a_sine_cosine_embedding(grid):
    assert sincos_grid(sincos_pos_embed(24, grid)[None]) == grid
    assert sincos_grid(sincos_pos_embed(24, grid)[None].half()) == grid
    assert sincos_grid(torch.randn(1, 12, 24)) is None


def test_to_nnssl_and_back(tmp_path, monkeypatch, capsys):
    torch.save(official_state(), tmp_path / "o.pth")
    run(monkeypatch, capsys, tmp_path / "o.pth", "-o", tmp_path / "w.pth", "-num_heads", 2)
    assert run(monkeypatch, capsys, tmp_path / "w.pth", "-o", tmp_path / "n.pth", "--nnssl")[0] == 0
    exported = torch.load(tmp_path / "n.pth", weights_only=True)
    plan = exported[PLAN]
    network = HiEndMAEUNETR(
        ViTConfig.from_dict(plan["architecture_plans"]["arch_kwargs"]["encoder"]),
        input_channels=plan["pretrain_num_input_channels"],
        num_classes=2,
        img_size=tuple(plan["recommended_downstream_patchsize"]),
        feature_size=2,
    )
    prefix = plan["key_to_encoder"] + "."
    inside = {k.removeprefix(prefix): v for k, v in exported["network_weights"].items() if k.startswith(prefix)}
    network.get_submodule(plan["key_to_encoder"]).load_state_dict(inside, strict=True)
    for key in (plan["key_to_stem"], *plan["keys_to_in_proj"]):
        network.get_submodule(key)
    assert network.get_parameter(plan["key_to_lpe"]).shape == (1, 12, 24)

    code, out, _ = run(monkeypatch, capsys, tmp_path / "n.pth", "-o", tmp_path / "back.pth")
    assert code == 0 and "Dropped: vit.pos_embed." in out
    first, back = load_weights(tmp_path / "w.pth"), load_weights(tmp_path / "back.pth")
    assert set(first.encoder) - set(back.encoder) == {"cls_token"}
    assert all(torch.equal(first.encoder[key], value) for key, value in back.encoder.items())
    assert back.architecture == first.architecture and back.window_hu == first.window_hu
    code, _, err = run(monkeypatch, capsys, tmp_path / "n.pth", "-o", tmp_path / "x.pth", "-num_heads", 2)
    assert code == 2 and "leave it out" in err


@pytest.mark.slow
def test_real_size_within_memory(tmp_path):
    """1.47 GB, the size of the released file: peak memory of the whole command under 2.2 times that."""
    config = ModelConfig(
        **{**ENCODERS["large_p12"].to_dict(), "in_channels": 1}, img_size=(96, 96, 96), mask_ratio=0.75,
        decoder_embed_dim=528, decoder_num_heads=16, decoder_self_depth=2,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {f"module.{key}": value.shape for key, value in HiEndMAE(config).state_dict().items()}
    state = {key: torch.rand(shape) for key, shape in shapes.items()}
    state["module.encoder_pos_embed"] = sincos_pos_embed(1536, (8, 8, 8))[None]
    state["module.decoder_pos_embed"] = sincos_pos_embed(528, (8, 8, 8))[None]
    source = tmp_path / "official.pth"
    torch.save({"epoch": 1000, "state_dict": state}, source)
    del state
    command = [str(Path(sys.executable).with_name("hiendmae_import_weights")), str(source), "-o", str(tmp_path / "w")]
    # In a process of its own, whose only child it is: the tests before had children too.
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    said = subprocess.run([sys.executable, "-c", measure, *command], check=True, stdout=subprocess.PIPE, text=True)
    assert source.stat().st_size / 2 < int(said.stdout) * 1024 < 2.2 * source.stat().st_size
