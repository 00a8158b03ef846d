"""Arms that are compared train as the grid says, and a scratch arm has the network of the pre-trained one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DATASET, World

from nnunetv2_hiendmae.architectures.vit import ENCODERS, ViT
from nnunetv2_hiendmae.benchmark.arms import default_arms
from nnunetv2_hiendmae.benchmark.fair import check_fair, other_encoders, with_choices_fixed
from nnunetv2_hiendmae.benchmark.grid import Arm, Grid
from nnunetv2_hiendmae.benchmark.overlap import overlap_lines
from nnunetv2_hiendmae.benchmark.plan import plan
from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings
from nnunetv2_hiendmae.weights.file import load_weights, save_weights

NNUNET = Arm(name="nnunet", trainer="nnUNetTrainer")
SCRATCH = Arm(name="scratch", trainer="nnUNetTrainerHiEndMAE_scratch")
OURS = Arm(name="ours", trainer="nnUNetTrainerHiEndMAE")


def grid(*arms: Arm, **rest: object) -> Grid:
    return Grid(name="fair", datasets=(DATASET,), arms=arms, **rest)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    """An arm that starts from the weights of a small ViT, which nothing trained."""
    file = tmp_path_factory.mktemp("weights") / "nano.pth"
    config = ENCODERS["nano"]
    header = {"architecture": config.to_dict(), "window_hu": [-150.0, 250.0], "img_size": [32, 32, 32]}
    save_weights(file, ViT(config, (8, 8, 8), class_token=True).state_dict(), header)
    return replace(OURS, weights=str(file))


@pytest.fixture
def here(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of the phantoms whose folders are those of this process."""
    copied = World(tmp_path / "world")
    shutil.copytree(world.root / "raw", copied.root / "raw")
    shutil.copytree(world.root / "preprocessed", copied.root / "preprocessed")
    for name, value in copied.env.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    return copied


def test_scratch_gets_the_network_of_the_weights(ours: Arm) -> None:
    weights = load_weights(str(ours.weights))
    fixed = with_choices_fixed(grid(NNUNET, SCRATCH, ours))
    assert fixed.arms[0] == NNUNET and fixed.arms[2] == ours
    settings = FineTuneSettings(**fixed.arms[1].settings).resolved_scratch()
    assert settings.encoder == weights.architecture and tuple(settings.window_hu or ()) == weights.window_hu
    named = Arm(name="scratch", trainer=SCRATCH.trainer, settings={"architecture": "tiny"})
    assert with_choices_fixed(grid(named, ours)).arms[0] == named  # what the grid names stays
    assert with_choices_fixed(fixed) == fixed and other_encoders(fixed) == []
    assert [line.split(" has ")[0] for line in other_encoders(grid(named, ours))] == ["Arm scratch"]


def test_several_encoders_leave_no_control(ours: Arm, pretrained: Path) -> None:
    other = replace(ours, name="other", weights=str(pretrained))
    with pytest.raises(ValueError, match="Arm scratch: the pre-trained arms have different encoders"):
        with_choices_fixed(grid(SCRATCH, ours, other))


def test_weights_are_chosen_when_planned(monkeypatch: pytest.MonkeyPatch, pretrained: Path) -> None:
    monkeypatch.setenv("HIENDMAE_WEIGHTS", str(pretrained))
    arm = with_choices_fixed(grid(OURS)).arms[0]
    assert arm.weights == str(pretrained)
    monkeypatch.setenv("HIENDMAE_WEIGHTS", "nowhere.pth")
    with pytest.raises(ValueError, match=r"The weights file nowhere\.pth"):
        with_choices_fixed(grid(OURS))


@pytest.mark.parametrize(
    ("arms", "rest", "message"),
    [
        ([NNUNET], {"num_epochs": 3}, "nnUNetTrainer does not read the budget of the grid .num_epochs.. Name nnUNetTr"),
        ([Arm(name="x", trainer="nnUNetTrainer_5epochs")], {"no_mirroring": True}, "a trainer that does .nnUNetTrain"),
        (
            [Arm(name="x", trainer="nnUNetTrainer", settings={"initial_lr": 1.0})],
            {},
            "reads no settings .initial_lr.; remove",
        ),
        ([NNUNET, Arm(name="again", trainer="nnUNetTrainer")], {}, "The arms nnunet and again are the same"),
        ([SCRATCH, Arm(name="b", trainer=SCRATCH.trainer)], {"num_epochs": 1}, "The arms scratch and b are the same"),
        ([NNUNET], {"configurations": ("2d",), "batch_size": 2}, "cannot be given to the 2d configuration"),
    ],
)
def test_refused(arms: list[Arm], rest: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fair(grid(*arms, **rest))


def test_controls_are_arms_by_name() -> None:
    names = ["hiendmae", "plain_mae", "frozen", "identity", "scratch"]
    arms = default_arms("P", "hi.pth", True, names, plain_mae="mae.pth")
    assert [arm.name for arm in arms] == names  # the first is what the others are compared with
    assert [arm.weights for arm in arms] == ["hi.pth", "mae.pth", "hi.pth", None, None]
    assert arms[3].settings == {"identity_blocks": True} and arms[2].settings["frozen_epochs"] > 10**6
    arms = default_arms("P", "hi.pth", True, ["primus_hiendmae", "primus_m", "primus_v3_s"], primus_hiendmae="p.pth")
    assert [(arm.trainer, arm.weights) for arm in arms] == [
        ("nnUNetTrainerHiEndMAE", "p.pth"), ("nnUNetPrimusBudget", None), ("nnUNetPrimusV3Budget", None),
    ]  # fmt: skip
    assert [arm.name for arm in default_arms("P", None, False)][-1] == "hiendmae"
    for names, weights in ((["plain_mae"], None), (["hiendmae"], "mae.pth")):
        with pytest.raises(ValueError, match="-arms plain_mae needs -plain_mae FILE"):
            default_arms("P", "hi.pth", True, names, weights)


def test_pretrained_weights_of_nnunet_are_part_of_the_plans(here: World, tmp_path: Path) -> None:
    """Other weights are another run, and the arm without them is not taken for the one with them."""
    file = tmp_path / "start.pth"
    file.write_bytes(b"one")
    both = grid(NNUNET, Arm(name="started", trainer="nnUNetTrainer", weights=str(file)))
    plan(both, tmp_path)
    commands = (tmp_path / "commands.sh").read_text(encoding="utf-8").splitlines()[1:]
    assert [f"-pretrained_weights {file}" in line for line in commands] == [False, True]
    plans = here.root / "preprocessed" / DATASET / "nnUNetPlans_fair_started.json"
    first = plans.read_bytes()
    file.write_bytes(b"two")
    plan(both, tmp_path)
    assert plans.read_bytes() != first
    file.unlink()
    with pytest.raises(ValueError, match=r"Arm started: the weights file .*start\.pth does not exist"):
        plan(both, tmp_path)


def test_settings_of_hiendmae_plan_are_no_base(here: World, tmp_path: Path) -> None:
    here.run("hiendmae_plan -d 901 -plans_name unfair --epochs 3")
    with pytest.raises(ValueError, match="has settings of hiendmae_plan, which not every trainer reads"):
        plan(grid(Arm(name="x", trainer="nnUNetTrainer", plans="unfair")), tmp_path)


def test_cases_of_the_pretraining_are_no_test(here: World, pretrained: Path, tmp_path: Path) -> None:
    """Refused; marked in the reports if it is asked for; unknown for weights without fingerprints."""
    texts = load_weights(pretrained).patients
    assert texts is not None and len(texts) == 6
    ours = grid(Arm(name="ours", trainer="nnUNetTrainerHiEndMAE", weights=str(pretrained)))
    with pytest.raises(ValueError, match=r"test case\(s\) of Dataset901_TestPhantom were in the pre-training of"):
        plan(ours, tmp_path)
    planned, _ = plan(ours, tmp_path, allow_overlap=True)
    (line,) = overlap_lines(planned, tmp_path)
    assert (
        line.startswith("Test cases of Dataset901_TestPhantom in the pre-training of ours: ") and "OVERLAPPING" in line
    )
    weights, old = load_weights(pretrained), tmp_path / "old.pth"
    save_weights(old, weights.encoder, {k: v for k, v in weights.header.items() if k != "patients"})
    theirs = grid(Arm(name="ours", trainer="nnUNetTrainerHiEndMAE", weights=str(old)))
    (line,) = overlap_lines(plan(theirs, tmp_path)[0], tmp_path)
    assert "unknown: the weights carry no fingerprints" in line
