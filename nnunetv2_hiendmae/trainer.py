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

from nnunetv2_hiendmae.architectures.unetr import HiEndMAEUNETR
from nnunetv2_hiendmae.folders import read_plans
from nnunetv2_hiendmae.intensity import CanonicalIntensity, ChannelIntensity, clip_warning, plan_intensities
from nnunetv2_hiendmae.optim import FineTuneSchedule, layer_decay_groups
from nnunetv2_hiendmae.settings import BLOCK, NETWORK, FineTuneSettings
from nnunetv2_hiendmae.weights import Weights, find_weights, load_encoder, load_weights


class nnUNetTrainerHiEndMAE(nnUNetTrainer):
    """ViT with hierarchical decoder, started from Hi-End-MAE weights.

    Settings come from the ``hiendmae`` block of the plans configuration (``hiendmae_plan`` writes one). What the
    trainer resolves (architecture, window, sha256 of the weights) is saved in the block of the results' plans.json,
    so continuing, validating and predicting need neither the weights file nor an environment variable.
    """

    pretrained = True
    reads_budget = True

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
        channels += [ChannelIntensity(1.0, 0.0, False)] * (num_input_channels - len(channels))  # a cascade's one-hot
        return HiEndMAEUNETR(
            settings.encoder,
            input_channels=num_input_channels,
            num_classes=num_output_channels,
            img_size=tuple(configuration_manager.patch_size),
            feature_size=settings.feature_size,
            intensity=CanonicalIntensity(channels),
            drop_path=settings.drop_path,
            identity_blocks=settings.identity_blocks,
        )

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        choices = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return fewer_augmentations(self, choices, self.settings)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        if self.settings.no_augmentation:
            return nnUNetTrainerNoDA.get_training_transforms(*args, **kwargs)
        return super().get_training_transforms(*args, **kwargs)

    def initialize(self) -> None:
        """Resolve the settings, build everything as nnU-Net does, then copy the encoder's weights in."""
        weights = self._or_exit(self._resolve_settings)
        super().initialize()
        if weights is None:
            return
        image_channels = len(self.configuration_manager.normalization_schemes)
        report = self._or_exit(load_encoder, bare(self.network).vit, weights, image_channels)
        self.print_to_log_file(
            f"Loaded {len(report.used)} encoder tensors; dropped: {', '.join(report.dropped) or 'none'}; "
            f"fresh: {', '.join([*report.fresh, 'the whole segmentation decoder'])}"
        )

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """As nnU-Net; a checkpoint brings its own weights, so none are looked for."""
        self._resuming = True
        super().load_checkpoint(filename_or_checkpoint)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, FineTuneSchedule]:
        """AdamW with layer-wise learning rates, warm-up and polynomial decay; gradients clipped to norm 1."""
        settings, network = self.settings, bare(self.network)
        depth = network.vit.config.depth
        groups = layer_decay_groups(network, depth, settings.weight_decay, settings.layer_decay)
        optimizer = torch.optim.AdamW(groups, settings.initial_lr, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        # nnU-Net's train step clips to norm 12 just before; the norm 1 that transformers need follows here.
        optimizer.register_step_pre_hook(lambda *_: clip_gradients(network))
        warmup = min(settings.warmup_epochs, settings.num_epochs // 10)
        return optimizer, FineTuneSchedule(
            optimizer, settings.initial_lr, settings.num_epochs, warmup, settings.frozen_epochs
        )

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
            weights = self._find_weights()
            self.settings = self.settings.resolved(
                weights.architecture, weights.window_hu, weights=str(weights.path), weights_sha256=weights.sha256
            )
        else:
            self.settings = self.settings.resolved_scratch()
            self.print_to_log_file("Training from random initialisation.")
        self._refuse_other_network(saved)
        self._warn_clip()
        # The saved plans come from plans_manager; the configuration manager holds a copy of them.
        self.plans_manager.plans["configurations"][self.configuration_name][BLOCK] = self.settings.to_block()
        self.configuration_manager.configuration[BLOCK] = self.settings.to_block()
        return weights

    def _find_weights(self) -> Weights:
        path, reason = find_weights(self.settings.weights)
        weights = load_weights(path)
        wanted = self.settings.weights_sha256
        if wanted is not None and wanted != weights.sha256:
            raise ValueError(f"{path} has sha256 {weights.sha256}; the plans ask for {wanted}.")
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

    def _refuse_other_network(self, saved: FineTuneSettings | None) -> None:
        """Folds share one plans.json: another fold's network must be the same."""
        others = [p.parent.name for p in Path(self.output_folder_base).glob("fold_*/checkpoint_*.pth")]
        others = sorted(set(others) - {f"fold_{self.fold}"})
        if saved is not None and others and not saved.same_network(self.settings):
            raise ValueError(
                f"{', '.join(others)} in {self.output_folder_base} hold another network than fold {self.fold} would "
                f"(saved: {saved.to_block()}). Use the same weights, or plans of another name ('hiendmae_plan')."
            )

    def _warn_clip(self) -> None:
        assert self.settings.window_hu is not None
        configuration = self.configuration_manager.configuration
        channels = plan_intensities(self.plans_manager.plans, configuration, self.settings.window_hu)
        warning = clip_warning(channels, self.settings.window_hu, self.plans_manager.plans_name)
        if warning:
            self.print_to_log_file(f"WARNING: {warning}")

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


def clip_gradients(network: nn.Module) -> None:
    """Scale gradients to a total norm of at most 1."""
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)


def bare(network: nn.Module) -> Any:
    """The network without the wrappers of DDP and torch.compile."""
    network = network.module if isinstance(network, DistributedDataParallel) else network
    return network._orig_mod if isinstance(network, OptimizedModule) else network
