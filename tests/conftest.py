"""Shared fixtures: synthetic CT, preprocessed by nnU-Net's own command, and a short pre-training on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Test processes share the cores, and so do their commands; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from golden import SHARED

from pretraining.phantom import write_phantoms

DATASET = "Dataset901_TestPhantom"
CHECKOUT = Path(__file__).parents[1]


def shared_folder() -> Path:
    """Real CT beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no real CT in {SHARED}; name its folder in HIENDMAE_SHARED")
    return SHARED


@dataclass(frozen=True)
class World:
    """nnU-Net's three folders and the commands of this environment."""

    root: Path

    @property
    def env(self) -> dict[str, str]:
        """Environment of the commands: nnU-Net's three folders, few processes, none of the developer's settings."""
        mine = ("HIENDMAE_WEIGHTS", "nnUNet_extTrainer", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        env = {k: v for k, v in os.environ.items() if k not in mine}
        env |= {f"nnUNet_{kind}": str(self.root / kind) for kind in ("raw", "preprocessed", "results")}
        return {
            **env,
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "PYTHONWARNINGS": "default",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def run(self, command: str, ok: bool = True, **env: str) -> str:
        """Run a command of this environment, return its output; fails unless it ends as expected."""
        words = command.split()
        words[0] = str(Path(sys.executable).with_name(words[0]))
        done = subprocess.run(
            words,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            encoding="utf-8",
        )
        assert (done.returncode == 0) == ok, f"{command} → {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Six labelled phantoms of 6 × 6 × 8 mm, preprocessed under nnU-Net's default plans."""
    world = World(tmp_path_factory.mktemp("world"))
    write_phantoms(world.root / "raw", DATASET, num_training=6, num_test=1, spacing=(6.0, 6.0, 8.0))
    world.run("nnUNetv2_plan_and_preprocess -d 901 -c 3d_fullres -np 1 -npfp 1")
    return world


@pytest.fixture(scope="session")
def pretrained(world: World) -> Path:
    """Weights file of a pre-training of six steps."""
    world.run(
        "hiendmae_pretrain -d 901 -preset tiny -device cpu -steps 6 -batch_size 2 -val_every 3 "
        "-crop_size 24 32 40 -num_workers 1"
    )
    return world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres" / "tiny_901" / "encoder_weights.pth"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A failed test's processes must not slow down those after it."""
    yield
    from processes import end_all

    end_all()
