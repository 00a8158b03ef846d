"""Weights for nnU-Net's own trainers: a file for ``nnUNetv2_train … -pretrained_weights``.

nnU-Net's loader wants every tensor of the network but the ``.seg_layers.``, in its shape. So the network of the plans
is built as the trainer does, with its fresh decoder, and the encoder is put into it.
"""

from __future__ import annotations

from typing import Any

from nnunetv2.training.nnUNetTrainer.primus import primus_trainers
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.architectures.primus import PrimusConfig
from nnunetv2_hiendmae.intensity import ChannelIntensity, clip_warning, plan_intensities
from nnunetv2_hiendmae.weights.file import State, Weights, check_keys, load_encoder


def nnunet_trainer(encoder: EncoderConfig) -> str:
    """nnU-Net's trainer of this architecture. ``ValueError`` if there is none."""
    size = encoder.nnunet_size() if isinstance(encoder, PrimusConfig) else None
    if size is None:
        raise ValueError(
            f"nnU-Net has trainers for Primus S, B, M and L with tokens of 8³ voxels, none for this encoder of kind "
            f"'{encoder.kind}' ({encoder.to_dict()}). Train it with -tr nnUNetTrainerHiEndMAE."
        )
    return f"nnUNet_Primus_{size}_Trainer"


def to_nnunet(
    weights: Weights, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint that starts nnU-Net's Primus trainer under these plans.

    nnU-Net's network gets images in the domain of its plans and has no place for the map into the HU window. The map is
    linear, as the stem is: it becomes part of the stem. Within the window the tokens are those of our own network;
    beyond it, where ours clips, they are not.

    Returns:
        The checkpoint, and lines that say what was done.

    Raises:
        ValueError: no trainer of nnU-Net's for this encoder, or plans that it cannot train.
    """
    config = weights.architecture
    name = nnunet_trainer(config)
    manager = PlansManager(plans)
    if configuration not in manager.available_configurations:
        raise ValueError(f"-c {configuration}: {manager.plans_name} has {', '.join(manager.available_configurations)}.")
    plan = manager.get_configuration(configuration)
    patch = list(plan.patch_size)
    if len(patch) != 3 or any(n % p for n, p in zip(patch, config.patch_size, strict=True)):
        good = " ".join(str(max(1, round(n / 8)) * 8) for n in patch)
        raise ValueError(
            f"-c {configuration}: {name} needs a 3D patch divisible by {config.patch_size}; the plans have {patch}. "
            f"'hiendmae_plan -patch_size {good}' writes plans that have."
        )
    channels = plan_intensities(manager.plans, plan.configuration, weights.window_hu)
    inputs = determine_num_input_channels(manager, plan, dataset_json)
    outputs = manager.get_label_manager(dataset_json).num_segmentation_heads
    trainer = getattr(primus_trainers, name)
    network = trainer.build_network_architecture(manager, plan, inputs, outputs, False).state_dict()

    h, w, d = (n // p for n, p in zip(patch, config.patch_size, strict=True))
    encoder = type(config).from_dict({**config.to_dict(), "in_channels": inputs}).build((h, w, d), pretraining=False)
    report = load_encoder(encoder, weights, len(channels))
    state = encoder.state_dict()
    fold_intensities(state, config.stem, channels)
    merged = {**network, **state}
    check_keys(merged, network, str(weights.path))
    fresh = sorted({key.split(".")[0] for key in set(network) - set(state)})
    cut = clip_warning(channels, weights.window_hu, manager.plans_name)
    lines = [
        f"For {name} under {manager.plans_name}, {configuration}: patch {patch}, {inputs} channels, {outputs} classes.",
        f"Taken: {len(report.used)} tensors{f', resized: {grid_words(report.resized)}' if report.resized else ''}. "
        f"Fresh, as nnU-Net starts them: {', '.join(fresh)}.",
        f"In the stem: the map from the plans' intensities to the HU window {weights.window_hu[0]:g} to "
        f"{weights.window_hu[1]:g}, as nnU-Net's network has no other place for it. Values beyond the window are not "
        f"clipped there." if any(c.is_ct for c in channels) else "The stem is as it was: no channel is CT.",
        *([f"WARNING: {cut}"] if cut else []),
    ]  # fmt: skip
    return {"network_weights": merged, "trainer_name": name}, lines


def grid_words(resized: dict[str, str]) -> str:
    """``name (how)`` of each resized tensor."""
    return ", ".join(f"{name} ({how})" for name, how in resized.items())


def fold_intensities(state: State, stem: str, channels: list[ChannelIntensity]) -> None:
    """Make ``canonical = scale · x + shift`` of each channel part of the stem's weight and bias, in place."""
    weight, bias = state[f"{stem}.weight"].double(), state[f"{stem}.bias"].double()
    for c, channel in enumerate(channels):
        bias = bias + channel.shift * weight[:, c].flatten(1).sum(1)
        weight[:, c] *= channel.scale
    state[f"{stem}.weight"], state[f"{stem}.bias"] = weight.float(), bias.float()
