"""Nothing that is not finite is stepped, saved, or continued from."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATASET, World
from processes import RUNS, ended

from nnunetv2_hiendmae.weights.file import load_weights, save_weights
from pretraining.checkpoint import LATEST, OLDER, load_checkpoint, save_checkpoint
from pretraining.config import PRESETS, RunConfig
from pretraining.logs import METRICS
from pretraining.speed import random_batch
from pretraining.step import TrainState, agree, backward, update

# Crops of one case are constant: their loss is finite, the gradient of its square root at 0 is not.
POISON = """
import sys
import numpy as np
import torch
import pretraining.commands.pretrain as cli
from pretraining.data.b2nd import PreprocessedCorpus
from pretraining.model import HiEndMAE
read, loss = PreprocessedCorpus.read, HiEndMAE.forward_loss

def constant(self, case, start, size):
    crop = read(self, case, start, size)
    return np.zeros_like(crop) if self.name(case).endswith(CASE) else crop

def with_a_root(self, patches, pred, ids, intensity):
    target = self.target(patches, ids, intensity)
    return loss(self, patches, pred, ids, intensity) + 1e-3 * (pred * target).square().sum((1, 2)).sqrt().mean()

PreprocessedCorpus.read, HiEndMAE.forward_loss = constant, with_a_root
if __name__ == "__main__":
    cli.main()
"""
SIZE = "-preset nano -device cpu -crop_size 16 16 16 -num_workers 0 -preview_epochs 0"
FLAGS = f"-d 901 {SIZE} -batch_size 4 -log_every 1"


def poisoned(world: World, tmp_path: Path, flags: str, case: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """``hiendmae_pretrain`` on crops of which those of one case have a loss without a gradient."""
    script = tmp_path / "poison.py"
    script.write_text(POISON.replace("CASE", repr(case)), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    words = [sys.executable, *launcher, str(script), *f"{FLAGS} -val_every 2 -steps 30 {flags}".split()]
    return subprocess.run(
        words, env=world.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, "-precision fp32"), (1, "-precision bf16 -grad_clip 1 --activation_checkpointing"), (2, "-accumulate 2")],
)
def test_a_gradient_that_is_not_finite_is_not_stepped(world: World, tmp_path: Path, ranks: int, flags: str) -> None:
    """The loss is finite; the step is not taken, on any rank, and the case is named."""
    run = f"poison_{ranks}_{'bf16' in flags}"
    done = poisoned(world, tmp_path, f"{flags} -run {run}", "phantom_003", ranks)
    assert done.returncode == 1, done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("hiendmae_pretrain: error")]
    assert len(told) == ranks and "The gradient is not finite at step" in told[0]
    assert any(f"Crops with a non-finite gradient: {DATASET}/phantom_003 [" in line for line in told)
    assert len({line.split("at step ")[1].split(";")[0] for line in told}) == 1
    folder = world.root / RUNS / run
    dump = torch.load(next(folder.glob("non_finite_step_*.pth")), weights_only=True)
    assert all(tensor.isfinite().all() for tensor in dump["network_weights"].values())
    for file in folder.glob("checkpoint_*.pth"):
        saved = torch.load(file, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in saved["network_weights"].values())
    if (folder / METRICS).is_file():
        assert all(entry["grad_norm"] > 0 for entry in metrics(folder) if "loss" in entry)


def test_a_held_out_loss_that_is_not_finite_ends_the_run(world: World, tmp_path: Path) -> None:
    """The held-out case of this seed has NaN voxels; no training crop shows it."""
    script = tmp_path / "held_out.py"
    script.write_text(
        "import numpy as np\nimport pretraining.commands.pretrain as cli\nimport pretraining.train as engine\n"
        "held_out, engine.HELD_OUT_CROPS = engine.held_out_batches, 4\n"
        "engine.held_out_batches = lambda *a: [{**b, 'image': b['image'] * np.nan} for b in held_out(*a)]\n"
        "cli.main()\n",
        encoding="utf-8",
    )
    words = [sys.executable, str(script), *f"{FLAGS} -val_every 1 -steps 9 -run held_out_nan".split()]
    done = subprocess.run(words, env=world.env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1, done.stderr
    assert "The held-out loss is not finite at step 2; nothing of it was saved" in done.stderr
    assert f"Crops with a non-finite held-out loss: {DATASET}/phantom_" in done.stderr
    assert not list((world.root / RUNS / "held_out_nan").glob("checkpoint_*.pth"))


SCALED = """
import sys
import torch
import pretraining.commands.pretrain as cli
import pretraining.train as engine
backward, calls, engine.HELD_OUT_CROPS = engine.backward, [], 4

def poisoned(state, *args):
    calls.append(state.step)
    for parameter in state.model.parameters():
        parameter.register_hook(lambda g: g * float("inf") if len(calls) in ONLY else g) if len(calls) == 1 else None
    return backward(state, *args)

engine.backward = poisoned
cli.main()
"""


def test_fp16_skips_steps_that_overflow(world: World) -> None:
    """The scaler's business: weights stay, the scale is halved, the line of metrics says so, in plain JSON."""
    code = SCALED.replace("ONLY", "(2, 3)")
    words = [sys.executable, "-c", code, *f"{FLAGS} -precision fp16 -run fp16 -steps 4".split()]
    done = subprocess.run(words, env=world.env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    folder = world.root / RUNS / "fp16"
    steps = [entry for entry in metrics(folder) if "loss" in entry]
    assert ["skipped_steps" in entry for entry in steps] == [False, True, True, False]
    assert [math.isfinite(entry.get("grad_norm", math.inf)) for entry in steps] == [True, False, False, True]
    final = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert final["grad_scaler_state"]["scale"] == 65536 / 4
    assert final["optimizer_state"]["state"][0]["step"] == 2


def test_fp16_with_gradients_that_never_are_finite_ends(world: World) -> None:
    """No scale is low enough: after 16 halvings the run ends instead of doing nothing for ever."""
    words = [
        sys.executable,
        "-c",
        SCALED.replace("ONLY", "range(99)"),
        *f"{FLAGS} -precision fp16 -steps 30 -run never".split(),
    ]
    done = subprocess.run(words, env=world.env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1 and "The gradient is not finite at step 17;" in done.stderr, done.stderr


@pytest.fixture
def run(world: World, pretrained: Path, tmp_path: Path) -> World:
    """A finished pre-training, for changes of its own."""
    shutil.copytree(world.root / "preprocessed", tmp_path / "preprocessed")
    (tmp_path / "raw").mkdir()
    folder = tmp_path / "results" / pretrained.parent.relative_to(world.root / "results")
    shutil.copytree(pretrained.parent, folder)
    return World(tmp_path)


def spoil(state: dict[str, Any], where: str) -> dict[str, Any]:
    """One value of the weights, or of the optimizer's moments, becomes NaN."""
    if where == "weights":
        state["network_weights"]["mask_token"].view(-1)[3] = math.nan
    else:
        state["optimizer_state"]["state"][0]["exp_avg_sq"].view(-1)[0] = math.inf
    return state


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_neither_written_nor_continued(
    run: World, pretrained: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.root / "results" / pretrained.parent.relative_to(pretrained.parents[3])
    sound = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    (folder / "checkpoint_final.pth").rename(folder / OLDER.format(1))
    bad = spoil(torch.load(folder / OLDER.format(1), weights_only=True), where)
    with pytest.raises(FloatingPointError, match=r"is not finite after step 6; checkpoint_latest\.pth was not written"):
        save_checkpoint(folder / LATEST, bad)
    assert not (folder / LATEST).exists()
    torch.save(bad, folder / LATEST)  # as earlier versions did
    found = load_checkpoint(folder)
    assert "holds values that are not finite" in capsys.readouterr().out
    assert torch.equal(found["network_weights"]["mask_token"], sound["network_weights"]["mask_token"])
    (folder / OLDER.format(1)).unlink()
    size = " ".join(map(str, RunConfig.from_dict(sound["config"]).model.img_size))
    flags = f"-d 901 -preset tiny -device cpu -steps 6 -batch_size 2 -val_every 3 -crop_size {size} -num_workers 0"
    log = ended(f"hiendmae_pretrain {flags} --c", run, 2)
    assert "holds values that are not finite" in log and "has no sound checkpoint" in log


def test_weights_that_are_not_finite(pretrained: Path, tmp_path: Path) -> None:
    weights = load_weights(pretrained)
    name = "blocks.1.norm1.weight"
    encoder = {**weights.encoder, name: torch.full_like(weights.encoder[name], math.inf)}
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        save_weights(tmp_path / "bad.pth", encoder, weights.header)
    data = torch.load(pretrained, weights_only=True)
    torch.save({**data, "encoder": encoder}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=f"bad.pth is no sound weights file: ValueError: {name} holds values that are"):
        load_weights(tmp_path / "bad.pth")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_is_taken_after_one_that_is_not_finite(precision: str) -> None:
    """Its numbers are read when the next step is queued already; that one must not move the weights either."""
    preset, device = PRESETS["nano"], torch.device("cpu")
    model = preset.model(crop_size=(16, 16, 16), patch_size=(4, 4, 4), in_channels=1, mask_ratio=0.75)
    config = RunConfig(
        datasets=("X",), plans="p", configuration="c", model=model, steps=9, batch_size=2, precision=precision
    )
    state = TrainState.create(config, device)
    good = random_batch(config, 2)
    bad = {**good, "intensity": good["intensity"] * math.nan}
    weights = []
    for batch in (good, bad, good):
        loss, grad_norm = backward(state, state.model, [batch], config, device)
        update(state, 1e-3, agree(state, loss, grad_norm, stop=False))
        weights.append(state.model.mask_token.detach().clone())
    assert not torch.equal(weights[0], torch.zeros_like(weights[0])) and weights[0].isfinite().all()
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert state.optimizer.state[state.model.mask_token]["step"] == 1
