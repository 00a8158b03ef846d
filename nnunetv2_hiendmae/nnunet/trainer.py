"""The nnU-Net trainers. Everything not overridden here is nnU-Net."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_hiendmae.architectures.segmentation import PatchSegmenter
from nnunetv2_hiendmae.architectures.unetr import HiEndMAEUNETR
from nnunetv2_hiendmae.channels import channel_names
from nnunetv2_hiendmae.files import read_plans
from nnunetv2_hiendmae.intensity import (
    CanonicalIntensity,
    ChannelIntensity,
    channel_lines,
    clip_warning,
    plan_intensities,
)
from nnunetv2_hiendmae.nnunet.padding import pad_with_air
from nnunetv2_hiendmae.nnunet.settings import BLOCK, NETWORK, FineTuneSettings
from nnunetv2_hiendmae.optim import FineTuneSchedule, layer_decay_groups
from nnunetv2_hiendmae.weights.file import Weights, load_encoder, load_weights
from nnunetv2_hiendmae.weights.find import find_weights


class nnUNetTrainerHiEndMAE(nnUNetTrainer):
    """Vision transformer and segmentation decoder, started from Hi-End-MAE weights.

    Settings come from the ``hiendmae`` block of the plans configuration (``hiendmae_plan`` writes one). What the
    trainer resolves (architecture, window, sha256 of the weights) is saved in the block of the results' plans.json,
    so continuing, validating and predicting need neither the weights file nor an environment variable.
    """

    pretrained = True
    reads_budget = True
    network: Any  # nnU-Net sets it to None first

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = self._or_exit(FineTuneSettings.from_configuration, self.configuration_manager.configuration)
        self.num_epochs = self.settings.num_epochs
        self.num_iterations_per_epoch = self.settings.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.num_val_iterations_per_epoch
        self.initial_lr = self.settings.initial_lr
        self.weight_decay = self.settings.weight_decay
        self.enable_deep_supervision = False
        self._resuming = False

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network that the resolved ``hiendmae`` block describes; also called by ``nnUNetv2_predict``."""
        configuration = configuration_manager.configuration
        settings = FineTuneSettings.from_configuration(configuration)
        if settings.encoder is None or settings.window_hu is None:
            raise ValueError(f"The plans have no resolved '{BLOCK}' block; they were not written by this trainer.")
        channels = plan_intensities(plans_manager.plans, configuration, settings.window_hu)
        channels += [ChannelIntensity()] * (num_input_channels - len(channels))  # a cascade's one-hot
        hierarchical = settings.segmentation_decoder == "hierarchical"
        own = {"feature_size": settings.feature_size} if hierarchical else {}
        return (HiEndMAEUNETR if hierarchical else PatchSegmenter)(
            settings.encoder,
            input_channels=num_input_channels,
            num_classes=num_output_channels,
            img_size=tuple(configuration_manager.patch_size),
            intensity=CanonicalIntensity(channels),
            drop_path=settings.drop_path,
            identity_blocks=settings.identity_blocks,
            **own,
        )

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        choices = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return fewer_augmentations(self, choices, self.settings)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        nnunets = (
            nnUNetTrainerNoDA.get_training_transforms
            if self.settings.no_augmentation
            else super().get_training_transforms
        )
        return pad_with_air(nnunets(*args, **kwargs), CanonicalIntensity(self._channels()))

    def get_validation_transforms(self, *args: Any, **kwargs: Any) -> Any:
        return pad_with_air(super().get_validation_transforms(*args, **kwargs), CanonicalIntensity(self._channels()))

    def initialize(self) -> None:
        """Resolve the settings, build everything as nnU-Net does, then copy the encoder's weights in."""
        weights = self._or_exit(self._resolve_settings)
        super().initialize()
        if self.settings.segmentation_decoder == "hierarchical":  # Primus' own decoder stays as nnU-Net starts it
            bare(self.network).head.expect_few(has_background=not self.label_manager.has_regions)
        if weights is None:
            return
        image_channels = len(self.configuration_manager.normalization_schemes)
        report = self._or_exit(load_encoder, bare(self.network).vit, weights, image_channels)
        self.print_to_log_file(
            f"Loaded {len(report.used)} encoder tensors; dropped: {', '.join(report.dropped) or 'none'}; "
            + "".join(f"{name}: {how}; " for name, how in report.resized.items())
            + f"fresh: {', '.join([*report.fresh, 'the whole segmentation decoder'])}"
        )

    def load_checkpoint(self, *checkpoint: dict[str, Any] | str, **named: dict[str, Any] | str) -> None:
        """As nnU-Net, whose versions differ in the argument's name; a checkpoint brings its own weights, so none are
        looked for."""
        self._resuming = True
        super().load_checkpoint(*checkpoint, *named.values())

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, FineTuneSchedule]:
        """AdamW with layer-wise learning rates, warm-up and polynomial decay; gradients clipped to norm 1."""
        settings, network = self.settings, bare(self.network)
        groups = layer_decay_groups(network, network.vit.config, settings.weight_decay, settings.layer_decay)
        optimizer = torch.optim.AdamW(groups, settings.initial_lr, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        # nnU-Net's train step clips to norm 12 just before; the norm 1 that transformers need follows here.
        optimizer.register_step_pre_hook(lambda *_: clip_gradients(network))
        warmup = min(settings.warmup_epochs, settings.num_epochs // 10)
        network.vit.requires_grad_(settings.frozen_epochs == 0)  # before DDP, which waits for what asks for gradients
        return optimizer, FineTuneSchedule(optimizer, settings.initial_lr, settings.num_epochs, warmup)

    def on_train_epoch_start(self) -> None:
        """As nnU-Net; in the first ``frozen_epochs`` the ViT is as in prediction and has no gradients to be clipped."""
        frozen = self.current_epoch < self.settings.frozen_epochs
        self.network = with_frozen_vit(self.network, frozen)
        super().on_train_epoch_start()
        bare(self.network).vit.train(not frozen)  # frozen: no stochastic depth

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The network has one output."""

    def _resolve_settings(self) -> Weights | None:
        """Fill in the settings from the checkpoint's plans or from weights, and write them into the plans."""
        if len(self.configuration_manager.patch_size) != 3:
            raise ValueError(f"{type(self).__name__} is a 3D network; train the 2d configuration with nnUNetTrainer.")
        weights, saved = None, self._saved_settings()
        if self._resuming:
            if saved is None:
                raise ValueError(f"{self.output_folder_base}/plans.json lacks the '{BLOCK}' block of the first run.")
            names = (*NETWORK, "weights", "weights_sha256")
            self.settings = replace(self.settings, **{n: getattr(saved, n) for n in names})
        elif self.pretrained:
            if self.settings.identity_blocks:
                raise ValueError("identity_blocks leaves no blocks for weights; use -tr nnUNetTrainerHiEndMAE_scratch.")
            weights = self._find_weights(saved)
            self.settings = self.settings.resolved(
                weights.architecture,
                weights.window_hu,
                weights=str(weights.path.absolute()),
                weights_sha256=weights.sha256,
            )
        else:
            self.settings = self.settings.resolved_scratch()
            self.print_to_log_file("Training from random initialisation.")
        self._refuse_other_folds(saved)
        self._log_channels()
        # The saved plans come from plans_manager; the configuration manager holds a copy of them.
        self.plans_manager.plans["configurations"][self.configuration_name][BLOCK] = self.settings.to_block()
        self.configuration_manager.configuration[BLOCK] = self.settings.to_block()
        return weights

    def _find_weights(self, saved: FineTuneSettings | None) -> Weights:
        """The file to start from; where nobody names one, that of the folds that were trained before."""
        named, by = self.settings.weights, "the plans"
        before = saved.weights if saved is not None and self._other_folds() else None
        if named is None and before is not None and Path(before).is_file():
            named, by = before, f"{self.output_folder_base}/plans.json, as for {', '.join(self._other_folds())}"
        path, reason = find_weights(named, by)
        weights = load_weights(path)
        wanted = self.settings.weights_sha256
        if wanted is not None and wanted != weights.sha256:
            raise ValueError(
                f"{path} ({reason}) has sha256 {weights.sha256}; the plans ask for {wanted}. Name that file, or write "
                f"plans for this one (hiendmae_plan --weights)."
            )
        self.print_to_log_file(f"Hi-End-MAE weights: {path} ({reason}), sha256 {weights.sha256}")
        return weights

    def _saved_settings(self) -> FineTuneSettings | None:
        """The block of the plans that an earlier run left in the results folder."""
        file = Path(self.output_folder_base) / "plans.json"
        if not file.is_file():
            return None
        plans = PlansManager(read_plans(file, "nnU-Net wrote it when the first fold was trained."))
        configuration = plans.get_configuration(self.configuration_name).configuration
        return FineTuneSettings.from_configuration(configuration) if BLOCK in configuration else None

    def _other_folds(self) -> list[str]:
        """Folders of the other folds that began to train."""
        base = Path(self.output_folder_base)
        begun = {p.parent.name for name in ("debug.json", "checkpoint_*.pth") for p in base.glob(f"fold_*/{name}")}
        return sorted(begun - {f"fold_{self.fold}"})

    def _refuse_other_folds(self, saved: FineTuneSettings | None) -> None:
        """Folds share one plans.json: another fold's network, and the weights it started from, must be the same."""
        others = ", ".join(self._other_folds())
        if saved is None or not others:
            return
        if not saved.same_network(self.settings):
            raise ValueError(
                f"{others} in {self.output_folder_base} hold another network than fold {self.fold} would "
                f"(saved: {saved.to_block()}). Use the same weights, or plans of another name ('hiendmae_plan')."
            )
        if saved.weights_sha256 != self.settings.weights_sha256:
            raise ValueError(
                f"{others} in {self.output_folder_base} started from {saved.weights} (sha256 {saved.weights_sha256}), "
                f"fold {self.fold} would start from {self.settings.weights} (sha256 {self.settings.weights_sha256}). "
                f"All folds of a model start from the same: name those weights with HIENDMAE_WEIGHTS=FILE, or train "
                f"under plans of another name ('hiendmae_plan -plans_name NAME --weights FILE')."
            )

    def _channels(self) -> list[ChannelIntensity]:
        assert self.settings.window_hu is not None
        configuration, names = self.configuration_manager.configuration, channel_names(self.dataset_json)
        return plan_intensities(self.plans_manager.plans, configuration, self.settings.window_hu, names)

    def _log_channels(self) -> None:
        """What the encoder gets of each channel."""
        channels = self._channels()
        assert self.settings.window_hu is not None
        lines = channel_lines(channels, channel_names(self.dataset_json))
        warning = clip_warning(channels, self.settings.window_hu, self.plans_manager.plans_name)
        for line in [*lines, *([f"WARNING: {warning}"] if warning else [])]:
            self.print_to_log_file(line)

    def _or_exit(self, function: Any, *args: Any) -> Any:
        """Tell a user's mistake in one logged line instead of a traceback."""
        try:
            return function(*args)
        except ValueError as error:
            self.print_to_log_file(f"ERROR: {error}")
            raise SystemExit(1) from None


def fewer_augmentations(
    trainer: nnUNetTrainer, choices: tuple[Any, ...], settings: FineTuneSettings
) -> tuple[Any, ...]:
    """nnU-Net's rotation, 2D augmentation, patch size and mirrored axes, less what ``settings`` leave out.

    What is not mirrored in training is not in prediction; crops that are not rotated need no margin.
    """
    rotation, dummy_2d, patch_size, axes = choices
    if settings.no_augmentation:
        patch_size = trainer.configuration_manager.patch_size
    if settings.no_augmentation or settings.no_mirroring:
        axes = trainer.inference_allowed_mirroring_axes = None
    return rotation, dummy_2d, patch_size, axes


class nnUNetTrainerHiEndMAE_scratch(nnUNetTrainerHiEndMAE):
    """The same network and schedule from random initialisation."""

    pretrained = False


def with_frozen_vit(network: nn.Module, frozen: bool) -> nn.Module:
    """The network, as it is wrapped, whose ViT asks for gradients or, while frozen, does not."""
    vit = bare(network).vit
    if all(parameter.requires_grad != frozen for parameter in vit.parameters()):
        return network
    vit.requires_grad_(not frozen)
    if isinstance(network, DistributedDataParallel):  # it exchanges what asked for gradients when it was made
        return DistributedDataParallel(network.module, device_ids=network.device_ids)
    return network


def clip_gradients(network: nn.Module) -> None:
    """Scale gradients to a total norm of at most 1."""
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)


def bare(network: nn.Module) -> Any:
    """The network without the wrappers of DDP and torch.compile."""
    network = network.module if isinstance(network, DistributedDataParallel) else network
    return network._orig_mod if isinstance(network, OptimizedModule) else network
