"""What makes a comparison one of like with like: choices fixed when a grid is planned, and grids that are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from nnunetv2_hiendmae.architectures.kinds import ENCODERS
from nnunetv2_hiendmae.benchmark.arms import DEFAULTS, PRIMUS, trainer_class
from nnunetv2_hiendmae.benchmark.grid import Arm, Grid
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW
from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings
from nnunetv2_hiendmae.nnunet.trainer import nnUNetTrainerHiEndMAE
from nnunetv2_hiendmae.weights.file import load_weights
from nnunetv2_hiendmae.weights.find import find_weights


def with_choices_fixed(grid: Grid) -> Grid:
    """The grid with what its trainers would choose when they start: weights, and the network of scratch arms.

    Weights that no arm names are found now, so that a pre-training which ends later changes nothing. A scratch arm that
    names no architecture gets the network and window of the pre-trained arms: it is their control.

    Raises:
        ValueError: no weights found, or pre-trained arms with several networks beside a scratch arm that names none.
    """
    ours = {arm.name: issubclass(trainer_class(arm.trainer), nnUNetTrainerHiEndMAE) for arm in grid.arms}
    arms = [
        replace(arm, weights=str(find_weights(None)[0].absolute())) if ours[arm.name] and is_open(arm) else arm
        for arm in grid.arms
    ]
    networks: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if ours[arm.name] and arm.weights is not None and trainer_class(arm.trainer).pretrained:
            network = network_settings(arm)
            networks.setdefault(str(network), network)
    for i, arm in enumerate(arms):
        if not networks or not ours[arm.name] or arm.weights is not None or "architecture" in arm.settings:
            continue
        if len(networks) > 1:
            raise ValueError(
                f"Arm {arm.name}: the pre-trained arms have different networks ({'; '.join(networks)}). Name the "
                f"'architecture' of this arm in its settings in the grid."
            )
        (network,) = networks.values()
        arms[i] = replace(arm, settings={**network, **arm.settings})
    return replace(grid, arms=tuple(arms))


def other_encoders(grid: Grid) -> list[str]:
    """A line for each scratch arm that is no control, as its network or window is that of no pre-trained arm."""
    ours = [arm for arm in grid.arms if issubclass(trainer_class(arm.trainer), nnUNetTrainerHiEndMAE)]
    pretrained = [replace(resolved(arm), identity_blocks=False) for arm in ours if arm.weights is not None]
    lines = []
    for arm in ours:
        scratch = replace(FineTuneSettings(**arm.settings).resolved_scratch(), identity_blocks=False)
        if pretrained and arm.weights is None and not any(map(scratch.same_network, pretrained)):
            lines.append(
                f"Arm {arm.name} has another network or HU window than the pre-trained arms; it is no control."
            )
    return lines


def is_open(arm: Arm) -> bool:
    """Whether the trainer would look for weights itself."""
    return arm.weights is None and bool(getattr(trainer_class(arm.trainer), "pretrained", False))


def resolved(arm: Arm) -> FineTuneSettings:
    """The settings of a pre-trained arm with what its weights bring."""
    weights = load_weights(str(arm.weights))
    return FineTuneSettings(**arm.settings).resolved(weights.architecture, weights.window_hu)


def network_settings(arm: Arm) -> dict[str, Any]:
    """The settings that give a scratch arm the network of a pre-trained one."""
    settings = resolved(arm)
    preset = next((name for name, config in ENCODERS.items() if config == settings.encoder), None)
    network: dict[str, Any] = {"architecture": preset or settings.architecture}
    network |= {name: arm.settings[name] for name in ("segmentation_decoder", "feature_size") if name in arm.settings}
    if tuple(settings.window_hu or ()) != tuple(DEFAULT_WINDOW):
        network["window_hu"] = list(settings.window_hu or ())
    return network


def check_fair(grid: Grid) -> None:
    """``ValueError`` for a grid that cannot be trained as it says; names the arm and the remedy."""
    models: dict[str, str] = {}
    for arm in grid.arms:
        cls = trainer_class(arm.trainer)
        ours = issubclass(cls, nnUNetTrainerHiEndMAE)
        budget = grid.budget_of(arm)
        if budget and not getattr(cls, "reads_budget", False):
            twins = {trainer: budgeted for _, trainer, budgeted, _ in DEFAULTS + PRIMUS}
            raise ValueError(
                f"Arm {arm.name}: {arm.trainer} does not read the budget of the grid ({', '.join(budget)}). Name "
                f"{twins.get(arm.trainer, 'a trainer that does (nnUNetTrainerBudget)')} as its trainer, or leave the "
                f"budget out."
            )
        if arm.settings and not ours:
            raise ValueError(
                f"Arm {arm.name}: {arm.trainer} reads no settings ({', '.join(arm.settings)}); remove them."
            )
        other = models.setdefault(json.dumps({**asdict(arm), "name": None}, sort_keys=True), arm.name)
        if other != arm.name:
            raise ValueError(f"The arms {other} and {arm.name} are the same; take one out of the grid.")
    if "2d" in grid.configurations and (any(map(grid.budget_of, grid.arms)) or grid.patch_size or grid.batch_size):
        raise ValueError("A budget or sizes cannot be given to the 2d configuration; leave one or the other out.")
