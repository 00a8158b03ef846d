"""The kind ``primus``: equal to nnU-Net's Primus, and masked pre-training on it equal to a second, plain writing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import plain_hiendmae
import plain_primus
import pytest
import torch
from dynamic_network_architectures.architectures import primus as stock

from nnunetv2_hiendmae.architectures import (
    ENCODERS,
    HiEndMAEUNETR,
    PrimusConfig,
    PrimusEncoder,
    ViTConfig,
    encoder_config,
)
from nnunetv2_hiendmae.architectures.segmentation import PatchSegmenter
from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings
from nnunetv2_hiendmae.optim import decay_groups, layer_decay_groups
from pretraining import HiEndMAE, ModelConfig
from pretraining.config import PRESETS
from pretraining.preview import reconstruct

TINY = PrimusConfig(patch_size=(8, 4, 4), embed_dim=24, depth=3, num_heads=2, taps=(0, 2), num_register_tokens=2)
VIT = ViTConfig(patch_size=(4, 4, 8), embed_dim=12, depth=2, num_heads=2, taps=(0, 1))
MODEL = ModelConfig(
    img_size=(16, 12, 8), patch_size=(8, 4, 4), in_channels=2, embed_dim=24, depth=3, num_heads=2, mlp_ratio=2.5,
    taps=(0, 2), mask_ratio=0.5, decoder_embed_dim=12, decoder_num_heads=2, decoder_self_depth=1, kind="primus",
)  # fmt: skip
MODELS = {
    "non-cubic, two channels": MODEL,
    "register tokens": replace(MODEL, encoder_options={"num_register_tokens": 2}),
    "control: last layer": replace(MODEL, decoder="last_layer"),
    "control: plain MAE": replace(MODEL, decoder="self_attention"),
}


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """In double precision, and not at its trivial start."""
    torch.manual_seed(0)
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def stock_features(config: PrimusConfig, encoder: PrimusEncoder, x: torch.Tensor) -> torch.Tensor:
    """What nnU-Net's Primus with these weights gives its decoder, ``(B, E, gh, gw, gd)``."""
    network = stock.Primus(
        config.in_channels, config.embed_dim, config.patch_size, 2, config.depth, config.num_heads, tuple(x.shape[2:]),
        num_register_tokens=config.num_register_tokens, mlp_ratio=config.mlp_ratio,
        init_values=config.init_values, scale_attn_inner=config.scale_attn_inner,
    ).double()  # fmt: skip
    state = encoder.state_dict()
    assert {k for k in network.state_dict() if not k.startswith("up_projection")} - {"mask_token"} == set(state)
    network.load_state_dict(state, strict=False)
    seen: list[torch.Tensor] = []
    network.up_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(x)
    return seen[0]


@pytest.mark.parametrize("changes", [{}, {"num_register_tokens": 0, "in_channels": 2}, {"init_values": None}])
def test_with_every_token_visible_it_is_nnunets_primus(changes) -> None:
    config = replace(TINY, **changes)
    encoder = shaken(config.build((2, 3, 2)))
    x = torch.rand(2, config.in_channels, 16, 12, 8, dtype=torch.float64)
    expected = stock_features(config, encoder, x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(x)[1], expected, rtol=0, atol=1e-6)

    ids = torch.stack([torch.randperm(12), torch.randperm(12)])  # as in pre-training, in any order
    patches = plain_hiendmae.tokens_of(x, config.patch_size).flatten(2)
    tokens = encoder.project(torch.stack([patches[b, ids[b]] for b in range(2)]))
    places = [torch.cat([p[:, row] for row in ids]) for p in encoder.positions_for((2, 3, 2))]
    shuffled = encoder.encode(tokens, *places)[1]
    torch.testing.assert_close(shuffled, torch.stack([expected[b, ids[b]] for b in range(2)]), rtol=0, atol=1e-6)


def test_another_grid_is_nnunets_primus_of_that_size() -> None:
    encoder = shaken(TINY.build((2, 3, 2)))
    larger = TINY.build((3, 2, 4)).double()
    state = {**encoder.state_dict(), "eva.pos_embed": larger.eva.pos_embed}
    larger.load_state_dict(state)
    with torch.no_grad():  # the learned embedding is interpolated; all else is that of the other size
        at_places = encoder.positions_for((3, 2, 4))[0]
        registers = encoder.eva.pos_embed[:, :2]
        larger.eva.pos_embed.copy_(torch.cat([registers, at_places], 1))
    x = torch.rand(1, 1, 24, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(encoder(x)[1], larger(x)[1])
    assert encoder.positions_for((2, 3, 2))[0].shape == (1, 12, 24)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_against_the_plain_implementation(config) -> None:
    mae = shaken(HiEndMAE(config))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, config.in_channels, *config.img_size, generator=generator, dtype=torch.float64)
    ids = torch.rand(2, config.num_tokens, generator=generator).argsort(1)
    parameters = dict(mae.named_parameters())
    loss, pred = plain_hiendmae.forward(parameters, config, x, ids, plain_primus.encoder)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    output = mae(x, ids, return_pred=True)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert output.pred.shape == (2, config.num_tokens, config.patch_dim)
    torch.testing.assert_close(output.pred, pred, rtol=0, atol=2e-6)  # positions are float32
    mae(x, ids).loss.backward()
    for name, parameter in parameters.items():
        assert (parameter.grad - expected[name]).norm() <= 2e-5 * expected[name].norm() + 1e-9, name


def test_the_order_of_visible_tokens_and_masked_voxels_do_not_matter() -> None:
    mae = shaken(HiEndMAE(MODELS["register tokens"]))
    x, ids = torch.rand(2, 2, 16, 12, 8, dtype=torch.float64), torch.stack([torch.randperm(12) for _ in range(2)])
    seen, rebuilt = reconstruct(mae, x, ids)
    hidden = torch.where(seen.isnan(), 0.7, x)
    assert not torch.equal(hidden, x)
    again = torch.cat([ids[:, :6].flip(1), ids[:, 6:]], 1)
    for tap, other in zip(mae.forward_encoder(mae.crop_patches(x), ids)[0],
                          mae.forward_encoder(mae.crop_patches(hidden), again)[0], strict=True):  # fmt: skip
        torch.testing.assert_close(tap, other.flip(1))
    assert rebuilt.shape == x.shape


def test_presets_have_the_sizes_of_nnunets_trainers() -> None:
    for name in "SBML":
        config, sizes = ENCODERS[f"primus_{name.lower()}"], stock._PRIMUS_CONFIGS[name]
        assert (config.embed_dim, config.depth, config.num_heads) == tuple(
            sizes[k] for k in ("embed_dim", "eva_depth", "eva_numheads")
        )
        with torch.device("meta"):
            ours = config.build((4, 4, 4), pretraining=True).state_dict()
            theirs = getattr(stock, f"Primus{name}")(1, 2, (8, 8, 8), (32, 32, 32)).state_dict()
        rest = {k for k in theirs if k.startswith("up_projection") or k == "mask_token"}
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if k not in rest}
    for name in ("primus_s", "primus_b", "primus_m"):
        preset = PRESETS[name]
        model = preset.model(crop_size=(32, 32, 64), patch_size=(8, 8, 8), in_channels=1, mask_ratio=0.75)
        assert model.encoder == ENCODERS[name] and model.kind == "primus"


def test_architecture_as_plain_data() -> None:
    plain = json.loads(json.dumps(TINY.to_dict()))
    assert plain["kind"] == "primus" and encoder_config(plain) == TINY
    vit = ENCODERS["tiny"].to_dict()
    assert encoder_config({k: v for k, v in vit.items() if k != "kind"}) == ENCODERS["tiny"]  # of version 0.1
    for changes, message in (
        ({"kind": "cnn"}, "Unknown encoder kind 'cnn'; known: vit, primus"),
        ({"kind": "vit"}, r"Unknown architecture keys \['init_values', 'num_register_tokens', 'scale_attn_inner'\]"),
        ({"embed_dim": 30}, "embed_dim=30 must be divisible by 6 × num_heads=2"),
        ({"num_register_tokens": -1}, "num_register_tokens=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder_config({**plain, **changes})
    with pytest.raises(ValueError, match="Unknown architecture keys \\['colour'\\]"):
        replace(MODEL, encoder_options={"colour": 1})


def test_layer_decay_and_weight_decay_follow_the_kind() -> None:
    network = HiEndMAEUNETR(TINY, input_channels=1, num_classes=2, img_size=(16, 12, 8), feature_size=2)
    names = {id(p): name for name, p in network.named_parameters()}
    groups = layer_decay_groups(network, TINY, 0.05, 0.5)
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == set(names.values())
    assert (
        scale["vit.down_projection.proj.weight"] == scale["vit.register_tokens"] == scale["vit.eva.pos_embed"] == 0.5**5
    )
    assert scale["vit.eva.blocks.2.attn.q_proj.weight"] == 0.5**2 and scale["vit.eva.norm.weight"] == 0.5
    assert scale["head.seg_layers.0.weight"] == 1
    mae = HiEndMAE(MODELS["register tokens"])
    names = {id(p): name for name, p in mae.named_parameters()}
    decayed = {
        names[id(p)] for g in decay_groups(mae.named_parameters(), 0.05) if g["weight_decay"] for p in g["params"]
    }
    assert "encoder.eva.blocks.0.mlp.fc1_g.weight" in decayed
    assert not any(n.endswith(("bias", "gamma_1", "gamma_2", "pos_embed", "_token", "_tokens")) for n in decayed)


@pytest.mark.parametrize("decoder", [HiEndMAEUNETR, PatchSegmenter])
@pytest.mark.parametrize("config", [TINY, VIT], ids=["primus", "vit"])
def test_segmentation_of_any_size(decoder, config) -> None:
    network = decoder(config, input_channels=2, num_classes=3, img_size=(16, 12, 8))
    x = torch.rand(1, 2, 17, 13, 9, requires_grad=True)
    y = network(x)
    assert y.shape == (1, 3, 17, 13, 9)
    y.square().mean().backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if "seg" in name or "up_projection" in name)
    control = decoder(config, input_channels=1, num_classes=2, img_size=(16, 12, 8), identity_blocks=True)
    assert control(torch.rand(1, 1, 16, 12, 8)).shape == (1, 2, 16, 12, 8)
    assert not any(".blocks." in name and name.startswith("vit") for name in control.state_dict())


def test_patch_decoder_wants_powers_of_two() -> None:
    with pytest.raises(ValueError, match=r"edges are powers of two; these are \(12, 12, 12\)"):
        FineTuneSettings(architecture="large_p12", segmentation_decoder="patch")
    with pytest.raises(ValueError, match="Unknown segmentation_decoder='unet'; known: hierarchical, patch"):
        FineTuneSettings(segmentation_decoder="unet")


def test_a_vit_does_without_primus() -> None:
    """Commands stay quick, and a Primus that cannot be imported hides nothing."""
    code = (
        "import sys; sys.modules['dynamic_network_architectures.building_blocks.eva'] = None\n"
        "from nnunetv2_hiendmae.architectures import ENCODERS, HiEndMAEUNETR\n"
        "HiEndMAEUNETR(ENCODERS['nano'], input_channels=1, num_classes=2, img_size=(8, 8, 8))\n"
        "assert 'timm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
