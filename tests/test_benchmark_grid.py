"""The grid as data: round trip, order of runs, what is refused."""

from __future__ import annotations

import json
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nnunetv2_hiendmae.benchmark.arms import default_arms, replaced_methods
from nnunetv2_hiendmae.benchmark.grid import Arm, Grid, read_grid
from nnunetv2_hiendmae.benchmark.run import ends_as_ctrl_c
from nnunetv2_hiendmae.commands.benchmark import parser

ARMS = (
    Arm(name="a", trainer="nnUNetTrainer"),
    Arm(name="b", trainer="nnUNetTrainerBudget", settings={"drop_path": 0.1}),
)
DATA = {"datasets": ("Dataset001_X",), "patch_size": (8, 8, 16)}
GRID = Grid(name="g", arms=ARMS, labels=(1, "10%", "all"), seeds=(0, 1), **DATA)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "grid.json"
    file.write_text(GRID.to_json())
    assert read_grid(file) == GRID


def test_runs_are_the_product_with_arms_innermost() -> None:
    runs = GRID.runs()
    assert [(r.labels, r.seed, r.arm.name) for r in runs[:3]] == [(1, 0, "a"), (1, 0, "b"), (1, 1, "a")]
    assert [r.seed for r in runs if r.labels == "all"] == [0, 0]  # one subset of everything
    assert len(runs) == len({r.name for r in runs}) == 2 * (2 + 2 + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": (0,)}, "Label budget 0 must be"),
        ({"labels": ("100%",)}, "Label budget '100%' must be"),
        ({"seeds": (1, 1)}, "must not be empty or repeat"),
        ({"arms": (ARMS[0], ARMS[0])}, "need different names"),
        ({"name": "a__b"}, "Grid name 'a__b' must be"),
        ({"num_epochs": 0}, "num_epochs=0 must be an integer"),
        ({"arms": (replace(ARMS[0], num_epochs=0),)}, "num_epochs=0 must be an integer"),
        ({"folds": (-1,)}, "folds=-1 must be an integer of at least 0"),
        ({"folds": (0.0,)}, "folds=0.0 must be an integer"),
        ({"seeds": 3}, "seeds=3 must be a list"),
        ({"labels": (True,)}, "Label budget True must be"),
        ({"datasets": (505,)}, "datasets=.505. must be names"),
        ({"configurations": "2d"}, "configurations='2d' must be a list"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be an integer"),
        ({"patch_size": (8, 8, 8.0)}, "patch_size=8.0 must be an integer"),
        ({"num_epochs": True}, "num_epochs=True must be an integer"),
        ({"device": "gpu"}, "must be cuda, cpu or mps"),
    ],
)
def test_grid_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GRID, **change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a b"}, "Arm name 'a b'"),
        ({"settings": {"num_epochs": 3}}, "belong to the grid, not to settings"),
        ({"settings": {"epochs": 3}}, r"unknown settings \['epochs'\]"),
    ],
)
def test_arm_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arm(**{"name": "a", "trainer": "nnUNetTrainer", **values})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"arms": [], "colour": 1}), json.dumps({"name": "g"})])
def test_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "grid.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"grid\.json"):
        read_grid(file)


def test_plan_has_a_flag_for_every_field() -> None:
    args = vars(parser().parse_args(["plan", "-o", "x"]))
    assert {f.name for f in fields(Grid)} <= set(args)


def test_signals_are_given_back() -> None:
    """A handler that stays would be inherited by every process that is forked later, and keep it from ending."""
    before = signal.getsignal(signal.SIGTERM)
    with ends_as_ctrl_c():
        assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == before


def test_default_arms_train_as_nnunet_ships_them() -> None:
    """The trainers with a budget replace no more than those they are made from, but what ``no_mirroring`` and
    ``no_augmentation`` need."""
    augmentation = {"configure_rotation_dummyDA_mirroring_and_inital_patch_size", "get_training_transforms"}
    for plain, budget in zip(default_arms("P", None, False), default_arms("P", "w.pth", True), strict=True):
        assert (
            set(replaced_methods(budget.trainer)) - augmentation == set(replaced_methods(plain.trainer)) - augmentation
        )
    assert set(replaced_methods("nnUNetTrainerBudget")) == augmentation
