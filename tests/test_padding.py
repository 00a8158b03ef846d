"""nnU-Net pads with 0, the mean of the foreground under its own plans; the encoder gets air, as in pre-training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DATASET, World
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_hiendmae.architectures import HiEndMAEUNETR, ViTConfig
from nnunetv2_hiendmae.files import read_json
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, CanonicalIntensity, ChannelIntensity, channel_intensity
from nnunetv2_hiendmae.nnunet.padding import PadWithAir, pad_with_air

TRUNK = {"mean": 5.0, "std": 250.0, "percentile_00_5": -990.0, "percentile_99_5": 700.0}
ORGANS = {"mean": 90.0, "std": 40.0, "percentile_00_5": -100.0, "percentile_99_5": 240.0}
CONFIG = ViTConfig(patch_size=(4, 4, 4), embed_dim=12, depth=2, num_heads=2, taps=(0, 1))
NOT_CT = ChannelIntensity()


def stored(hu: float, properties: dict[str, float]) -> float:
    """HU as CTNormalization stores it."""
    clipped = np.clip(hu, properties["percentile_00_5"], properties["percentile_99_5"])
    return float((clipped - properties["mean"]) / properties["std"])


def ct_channel(properties: dict[str, float]) -> ChannelIntensity:
    return channel_intensity("CTNormalization", properties, DEFAULT_WINDOW)


def tissue(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def test_planes_of_zeros_at_the_faces_become_air() -> None:
    intensity = CanonicalIntensity([ct_channel(TRUNK), NOT_CT])
    x = torch.zeros(2, 2, 9, 8, 7)
    x[0, :, 2:7, :, 1:5] = tissue((2, 5, 8, 4))
    x[0, 0, 4] = 0  # inside, and so no padding
    x[1] = tissue((2, 9, 8, 7), 1)
    filled, air = intensity.fill_padding(x), stored(-1000, TRUNK)
    expected = x.clone()
    expected[0, 0] = air
    expected[0, 0, 2:7, :, 1:5] = x[0, 0, 2:7, :, 1:5]
    torch.testing.assert_close(filled, expected)
    assert intensity(filled)[0, 0, 0].max() == 0 and intensity(x)[0, 0, 0].min() > 0.4


def test_a_tile_of_padding_alone_is_air() -> None:
    intensity = CanonicalIntensity([ct_channel(TRUNK)])
    assert intensity(intensity.fill_padding(torch.zeros(1, 1, 4, 5, 6))).abs().max() == 0


def test_nothing_changes_where_0_is_air_or_no_ct() -> None:
    window = {**TRUNK, "window_lower": -175.0, "window_upper": 250.0}
    for channel in (channel_intensity("HUWindowNormalization", window, DEFAULT_WINDOW), NOT_CT):
        x = torch.zeros(1, 1, 4, 5, 6)
        assert CanonicalIntensity([channel]).fill_padding(x) is x


@pytest.mark.parametrize("properties", [TRUNK, ORGANS], ids=["whole window", "clip inside the window"])
@torch.no_grad()
def test_padding_to_whole_tokens_is_air_too(properties: dict[str, float]) -> None:
    """Under plans that clip inside the window it is what air inside the image looks like."""
    channel = ct_channel(properties)
    network = HiEndMAEUNETR(
        CONFIG, input_channels=1, num_classes=2, img_size=(6, 8, 8), feature_size=2,
        intensity=CanonicalIntensity([channel]),
    )  # fmt: skip
    x = torch.full((1, 1, 6, 8, 8), stored(-1000, properties))
    tokens, _ = network.pad_to_patches(network.intensity(x))
    assert tokens.shape[2:] == (8, 8, 8)
    torch.testing.assert_close(tokens, torch.full_like(tokens, channel.air))


@pytest.fixture
def seen() -> list[Tensor]:
    return []


@pytest.fixture
def plans(world: World) -> tuple[PlansManager, dict]:
    folder = world.root / "preprocessed" / DATASET
    return PlansManager(str(folder / "nnUNetPlans.json")), read_json(folder / "dataset.json")


def watched(seen: list[Tensor], properties: dict[str, float]) -> HiEndMAEUNETR:
    """A network that notes what its encoder gets."""
    torch.manual_seed(0)
    network = HiEndMAEUNETR(
        CONFIG, input_channels=1, num_classes=5, img_size=(12, 12, 12), feature_size=2,
        intensity=CanonicalIntensity([ct_channel(properties)]),
    )  # fmt: skip
    network.vit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    return network


def test_prediction_of_an_image_smaller_than_the_patch(plans, seen: list[Tensor]) -> None:
    """nnU-Net's own predictor, with mirroring."""
    manager, description = plans
    configuration = manager.get_configuration("3d_fullres")
    size = np.array(configuration.patch_size)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=True)
    network = watched(seen, TRUNK)
    predictor.manual_initialization(network, manager, configuration, [network.state_dict()], description, "X", (0,))
    image = tissue((1, *(size - (6, 4, 0))))
    predictor.predict_sliding_window_return_logits(image)
    assert len(seen) == 2
    for tokens, flip in zip(seen, ((), (2,)), strict=True):
        tokens = tokens.flip(flip)[0, 0, : size[0], : size[1], : size[2]]
        inside = torch.zeros_like(tokens, dtype=torch.bool)
        inside[3:-3, 2:-2] = True
        assert tokens[~inside].abs().max() == 0
        torch.testing.assert_close(tokens[3:-3, 2:-2], network.intensity(image[None])[0, 0])


def batch(world: World, plans, transforms) -> Tensor:
    """Of nnU-Net's loader, whose patches are larger than the images."""
    manager, description = plans
    dataset = nnUNetDatasetBlosc2(str(world.root / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres"))
    patch = [int(n) + 12 for n in manager.get_configuration("3d_fullres").median_image_size_in_voxels]
    np.random.seed(0)
    labels = manager.get_label_manager(description)
    return next(nnUNetDataLoader(dataset, 2, patch, patch, labels, transforms=transforms))["data"]


def test_training_patches_beyond_the_image(world: World, plans) -> None:
    """nnU-Net's loader and validation transforms: 0 without ours, air with them; the image is the same."""
    manager, _ = plans
    properties = manager.foreground_intensity_properties_per_channel["0"]
    intensity = CanonicalIntensity([ct_channel(properties)])
    air = float(intensity.stored_air)
    transforms = nnUNetTrainer.get_validation_transforms(None)
    nnunets, ours = batch(world, plans, transforms), batch(world, plans, pad_with_air(transforms, intensity))
    padding = nnunets == 0
    assert 0.1 < padding.float().mean() < 0.9
    assert (ours[padding] == air).all() and torch.equal(ours[~padding], nnunets[~padding])


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_rotation_and_scaling_bring_in_air(dummy_2d: bool) -> None:
    """nnU-Net's training transforms on an image of air: not even interpolation at the border makes anything else."""
    intensity = CanonicalIntensity([ct_channel(TRUNK), NOT_CT])
    transforms = pad_with_air(
        nnUNetTrainer.get_training_transforms((10, 12, 14), (-0.5, 0.5), None, (0, 1, 2), dummy_2d), intensity
    )
    steps = transforms.transforms
    end = max(i for i, step in enumerate(steps) if isinstance(step, PadWithAir)) + 1
    air = stored(-1000, TRUNK)
    for seed in range(12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        data = {"image": torch.zeros(2, 12, 14, 16), "segmentation": torch.zeros(1, 12, 14, 16, dtype=torch.int16)}
        data["image"][0, 2:9] = air
        for step in steps[:end]:
            data = step(**data)
        torch.testing.assert_close(data["image"][0], torch.full_like(data["image"][0], air))
        assert data["image"][1].abs().max() == 0
