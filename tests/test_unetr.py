"""The segmentation network under any plan: grids, patch sizes, channels, anisotropy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nnunetv2_hiendmae.architectures import HiEndMAEUNETR, ViT, ViTConfig, interpolate_pos_embed, sincos_pos_embed
from nnunetv2_hiendmae.architectures.unetr import SegHead
from nnunetv2_hiendmae.weights.file import Weights, load_encoder

CONFIG = ViTConfig(patch_size=(6, 4, 8), embed_dim=24, depth=4, num_heads=2, taps=(0, 1, 3))


def build(config: ViTConfig = CONFIG, **changes) -> HiEndMAEUNETR:
    torch.manual_seed(0)
    settings = {"input_channels": 1, "num_classes": 3, "img_size": (12, 12, 16), "feature_size": 2, **changes}
    return HiEndMAEUNETR(config, **settings).eval()


def weights_of(config: ViTConfig = CONFIG, **header) -> Weights:
    """Pre-trained weights of an architecture, class token included."""
    torch.manual_seed(1)
    encoder = ViT(config, (2, 3, 2), class_token=True).state_dict()
    return Weights(Path("weights.pth"), encoder, {"architecture": config.to_dict(), **header})


@pytest.mark.parametrize("size", [(12, 12, 16), (24, 8, 40), (13, 12, 16), (7, 9, 11), (6, 4, 8), (5, 3, 7)])
@torch.no_grad()
def test_any_input_size(size):
    assert build()(torch.rand(2, 1, *size)).shape == (2, 3, *size)


@torch.no_grad()
def test_sizes_that_do_not_divide_are_padded_with_air():
    network = build()
    x = torch.rand(1, 1, 10, 11, 15)
    padded = torch.zeros(1, 1, 12, 12, 16)
    padded[:, :, :10, :11, :15] = x
    tokens, grid = network.pad_to_patches(x)
    assert grid == (2, 3, 2) and torch.equal(tokens, padded)
    whole, same_grid = network.pad_to_patches(padded)
    assert same_grid == grid and whole is padded


@pytest.mark.parametrize(
    ("patch", "taps", "steps"),
    [
        ((12, 12, 12), (3, 6, 9), [(2, 2, 2)] * 3),  # as published: 8 → 16 → 32 → 64, then interpolated to 96
        ((16, 16, 16), (3, 6, 9), [(2, 2, 2)] * 3),
        ((8, 8, 8), (3, 6, 9), [(2, 2, 2), (2, 2, 2), (1, 1, 1)]),  # stays below full resolution
        ((4, 16, 16), (3, 6, 9), [(2, 2, 2), (1, 2, 2), (1, 2, 2)]),
        ((1, 8, 2), (3, 6, 9), [(1, 2, 1), (1, 2, 1), (1, 1, 1)]),
        ((8, 8, 8), (2, 5), [(2, 2, 2)] * 2),
        ((8, 8, 8), (0, 2, 4, 6), [(2, 2, 2)] * 2 + [(1, 1, 1)] * 2),
    ],
)
def test_upsampling_steps(patch, taps, steps):
    config = ViTConfig(patch_size=patch, embed_dim=12, depth=10, num_heads=2, taps=taps)
    size = tuple(2 * p + 1 for p in patch)
    network = build(config, img_size=size)
    assert [block.up.stride for block in network.up_blocks] == steps
    logits = network(torch.rand(1, 1, *size))
    assert logits.shape == (1, 3, *size)
    logits.square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    # What follows the last tapped block reaches the output through the final norm, so everything learns.
    assert without == []


@torch.no_grad()
def test_parameters_do_not_depend_on_the_image_but_for_positions():
    small, large = build(), build(img_size=(24, 8, 17))
    shapes = {name: p.shape for name, p in small.named_parameters()}
    other = {name: p.shape for name, p in large.named_parameters()}
    assert {name for name in shapes if shapes[name] != other[name]} == {"vit.pos_embed"}
    assert other["vit.pos_embed"] == (1, 4 * 2 * 3, 24)


@torch.no_grad()
def test_positions_on_another_grid():
    fixed = ViT(CONFIG, (2, 3, 2), class_token=False)
    assert torch.equal(fixed.pos_embed_for((4, 1, 3))[0], sincos_pos_embed(24, (4, 1, 3)))
    assert fixed.pos_embed_for((2, 3, 2)) is fixed.pos_embed
    learned = ViT(CONFIG, (2, 3, 2), class_token=False, learned_pos_embed=True)
    learned.pos_embed.normal_()
    assert torch.equal(learned.pos_embed_for((4, 1, 3)), interpolate_pos_embed(learned.pos_embed, (2, 3, 2), (4, 1, 3)))
    assert learned.pos_embed_for((2, 3, 2)) is learned.pos_embed


def test_interpolation_is_linear_along_each_axis():
    """An embedding that is linear in h, w and d stays so between the outermost old positions."""
    old, new = (3, 4, 5), (6, 8, 10)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in old), indexing="ij")
    linear = torch.stack([a.reshape(-1) for a in axes], 1)[None]  # (1, L, 3)
    resampled = interpolate_pos_embed(linear, old, new).reshape(*new, 3)
    for axis, (n_old, n_new) in enumerate(zip(old, new, strict=True)):
        expected = ((torch.arange(n_new) + 0.5) * n_old / n_new - 0.5).clamp(0, n_old - 1)
        for i in range(n_new):
            plane = resampled.select(axis, i)[..., axis]
            torch.testing.assert_close(plane, expected[i].expand_as(plane))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@torch.no_grad()
def test_copies_of_one_channel_give_that_channels_features(channels):
    """The rule: the file's kernel, summed over its channels, divided by the number of image channels."""
    weights = weights_of()
    one, many = build(), build(input_channels=channels)
    for network, n in ((one, 1), (many, channels)):
        load_encoder(network.vit, weights, n)
    x = torch.rand(1, 1, 12, 12, 16)
    for a, b in zip(flat(one.vit(x)), flat(many.vit(x.expand(-1, channels, -1, -1, -1))), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@torch.no_grad()
def test_channels_of_the_file_are_summed_unless_the_numbers_agree():
    two = ViTConfig(**{**CONFIG.to_dict(), "in_channels": 2})
    weights = weights_of(two)
    kernel = weights.encoder["patch_embed.proj.weight"]
    same, three = build(input_channels=2), build(input_channels=3)
    load_encoder(same.vit, weights, 2)
    assert torch.equal(same.vit.patch_embed.proj.weight, kernel)
    load_encoder(three.vit, weights, 3)
    cascade = build(input_channels=4)  # two image channels, then the one-hot segmentation of the stage before
    load_encoder(cascade.vit, weights, 2)
    assert torch.equal(cascade.vit.patch_embed.proj.weight[:, :2], kernel)
    assert cascade.vit.patch_embed.proj.weight[:, 2:].abs().max() == 0
    for channel in three.vit.patch_embed.proj.weight.unbind(1):
        torch.testing.assert_close(channel, (kernel[:, 0] + kernel[:, 1]) / 3)


@torch.no_grad()
def test_channels_beyond_the_image_start_silent():
    """A cascade appends the previous stage's one-hot segmentation."""
    network, plain = build(input_channels=4), build(input_channels=2)
    load_encoder(network.vit, weights_of(), 2)
    load_encoder(plain.vit, weights_of(), 2)
    image, segmentation = torch.rand(1, 2, 12, 12, 16), torch.ones(1, 2, 12, 12, 16)
    with_stage = network.vit(torch.cat([image, segmentation], 1))
    for a, b in zip(flat(with_stage), flat(plain.vit(image)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@torch.no_grad()
def test_loading_says_what_became_of_each_tensor():
    network = build()
    before = network.vit.pos_embed.clone()
    report = load_encoder(network.vit, weights_of(), 1)
    assert report.dropped == ["cls_token"]
    assert report.fresh == ["pos_embed (sine-cosine)"]
    assert set(report.used) == set(network.vit.state_dict()) - {"pos_embed"}
    assert torch.equal(network.vit.pos_embed, before)


def test_loading_another_architecture_names_the_differences():
    other = ViTConfig(patch_size=(6, 4, 8), embed_dim=24, depth=5, num_heads=2, mlp_ratio=2.0, taps=(0, 1, 3))
    with pytest.raises(ValueError, match=r"weights.pth does not fit: unexpected: blocks.4.*\(48,\) instead of \(96,\)"):
        load_encoder(build().vit, weights_of(other), 1)


def flat(features: tuple[list[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    taps, final = features
    return [*taps, final]


def test_the_deepest_tap_joins_first() -> None:
    config = ViTConfig(patch_size=(4, 4, 4), embed_dim=12, depth=6, num_heads=2, taps=(0, 2, 4))
    network = HiEndMAEUNETR(config, input_channels=1, num_classes=2, img_size=(8, 8, 8), feature_size=2)
    seen: list[torch.Tensor] = []
    for path in network.tap_paths:
        path.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        network(x)
        taps, _ = network.vit(x)
    assert len(seen) == len(taps) == 3
    for volume, tap in zip(seen, reversed(taps), strict=True):
        assert torch.equal(volume.flatten(2).transpose(1, 2), tap)


def test_odds_of_an_organ_at_the_start() -> None:
    head = SegHead(4, 5)
    nothing = torch.zeros(1, 4, 2, 2, 2)
    head.expect_few(has_background=True)
    odds = head(nothing).softmax(1)
    assert torch.allclose(odds[:, 1:] / odds[:, :1], torch.tensor(0.02))
    head.expect_few(has_background=False)
    assert torch.allclose(head(nothing).sigmoid(), torch.tensor(0.02 / 1.02))


def test_compiled_it_is_one_graph_for_each_use() -> None:
    """Training, nnU-Net's validation step (no_grad) and prediction (inference mode): no break, no further compiling."""
    counted = CompileCounter()
    compiled = torch.compile(build(drop_path=0.1), backend=counted, fullgraph=True)
    two, one = torch.rand(2, 1, 12, 12, 16), torch.rand(1, 1, 12, 12, 16)
    for _ in range(2):
        compiled.train()(two).mean().backward()
        with torch.no_grad():
            compiled.eval()(two)
    with torch.inference_mode():
        for _ in range(3):
            compiled(one)
    assert counted.frame_count == 3
