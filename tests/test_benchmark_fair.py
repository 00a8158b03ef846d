"""Arms that are compared train as the grid says, and a scratch arm has the network of the pre-trained one."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DATASET, World

from nnunetv2_hiendmae.architectures.vit import ENCODERS, ViT
from nnunetv2_hiendmae.benchmark.arms import check_planned, default_arms
from nnunetv2_hiendmae.benchmark.fair import check_fair, other_encoders, with_choices_fixed
from nnunetv2_hiendmae.benchmark.grid import Arm, Grid, read_grid
from nnunetv2_hiendmae.benchmark.overlap import overlap_lines
from nnunetv2_hiendmae.benchmark.plan import plan
from nnunetv2_hiendmae.benchmark.run import encoder_of
from nnunetv2_hiendmae.commands.benchmark import main, parser, report_verb, robustness_verb, run_verb
from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings
from nnunetv2_hiendmae.weights.file import load_weights, save_weights

VERBS = {"run": run_verb, "report": report_verb, "robustness": robustness_verb}
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


def test_scratch_gets_the_tokens_and_the_decoder_of_the_arm(ours: Arm) -> None:
    """What an arm changes of the network of its weights holds for its control too, but not another control."""
    ours = replace(ours, settings={"vit_patch_size": [8, 8, 4], "feature_size": 8, "initial_lr": 0.1})
    identity = replace(SCRATCH, name="identity", settings={"identity_blocks": True})
    fixed = with_choices_fixed(grid(ours, SCRATCH, identity))
    for arm in fixed.arms[1:]:
        settings = FineTuneSettings(**arm.settings).resolved_scratch()
        assert settings.encoder is not None and settings.encoder.patch_size == (8, 8, 4)
        assert (settings.feature_size, settings.initial_lr) == (8, FineTuneSettings().initial_lr)
    assert [arm.settings.get("identity_blocks") for arm in fixed.arms] == [None, None, True]
    assert other_encoders(fixed) == []
    narrow = replace(fixed.arms[1], settings={**fixed.arms[1].settings, "feature_size": 4})
    assert [line.split(" has ")[0] for line in other_encoders(grid(ours, narrow))] == ["Arm scratch"]


def test_a_grid_that_was_edited_is_planned_again(here: World, ours: Arm, tmp_path: Path) -> None:
    """What the plans do not say is neither trained nor reported, whatever was edited."""
    ours = replace(ours, settings={"feature_size": 8})
    sizes = {"num_epochs": 3, "no_mirroring": True, "patch_size": (16, 16, 16), "batch_size": 2}
    budgeted = replace(NNUNET, trainer="nnUNetTrainerBudget")
    planned, _ = plan(grid(budgeted, ours, **sizes), tmp_path, allow_overlap=True)
    check_planned(planned, tmp_path)
    again = Path(str(ours.weights)).with_name("again.pth")
    shutil.copy(str(ours.weights), again)
    edits: list[dict[str, object]] = [
        {"num_epochs": 4}, {"no_mirroring": None}, {"no_augmentation": True}, {"patch_size": (32, 16, 16)},
        {"batch_size": 3}, {"arms": (budgeted, replace(ours, settings={"feature_size": 4}))},
        {"arms": (budgeted, replace(ours, weights=str(again)))}, {"arms": (replace(budgeted, num_epochs=9), ours)},
    ]  # fmt: skip
    for edit in edits:
        (tmp_path / "grid.json").write_text(replace(planned, **edit).to_json(), encoding="utf-8")  # type: ignore[arg-type]
        for verb in ("run", "report", "robustness"):
            with pytest.raises(ValueError, match=rf"is not what {tmp_path / 'grid.json'} says. Was that edited"):
                VERBS[verb](parser().parse_args([verb, "-o", str(tmp_path)]))
        plan(read_grid(tmp_path / "grid.json"), tmp_path, allow_overlap=True)
        check_planned(read_grid(tmp_path / "grid.json"), tmp_path)


def test_a_preset_with_other_tokens_is_what_the_plans_ask_for() -> None:
    """The block that a trainer saves has the new tokens in its architecture, the preset has its own."""
    wanted = {"architecture": "nano", "vit_patch_size": [8, 8, 8]}
    saved = FineTuneSettings(**wanted).resolved_scratch().to_block()  # type: ignore[arg-type]
    assert encoder_of(saved, wanted) == encoder_of(wanted, wanted)
    assert encoder_of(saved, wanted) != encoder_of({**saved, "architecture": "tiny"}, wanted)
    assert encoder_of(saved, {}) is None


def test_flags_that_exclude_a_grid_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "-o", "b", "-grid", "g.json", "-d", "505", "-f", "1", "--no_mirroring"]
    monkeypatch.setattr(sys, "argv", ["hiendmae_benchmark", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and all(flag in said for flag in ("-d [", "-f [", " --no_mirroring "))
    assert "datasets" not in said and "folds" not in said


def test_several_encoders_leave_no_control(ours: Arm, pretrained: Path) -> None:
    other = replace(ours, name="other", weights=str(pretrained))
    with pytest.raises(ValueError, match="Arm scratch: the pre-trained arms have different networks"):
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
    arms = default_arms("P", None, True, ["primus_hiendmae", "primus_m", "primus_v3_s"], primus_hiendmae="p.pth")
    assert [(arm.trainer, arm.weights) for arm in arms] == [
        ("nnUNetTrainerHiEndMAE", "p.pth"), ("nnUNetPrimusBudget", None), ("nnUNetPrimusV3Budget", None),
    ]  # fmt: skip
    assert [arm.name for arm in default_arms("P", None, False)][-1] == "hiendmae"
    with pytest.raises(ValueError, match="-weights is for the arms hiendmae and frozen"):
        default_arms("P", "hi.pth", True, ["nnunet", "scratch"])
    for names, weights in ((["plain_mae", "frozen"], None), (["hiendmae"], "mae.pth")):
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
