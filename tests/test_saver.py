"""The latest checkpoint is written beside training: what is written is the state at its moment, once a step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pretraining import saver as module
from pretraining.checkpoint import LATEST, OLDER, save_latest
from pretraining.saver import Saver


def state(step: int) -> dict[str, Any]:
    """As much of one as a checkpoint needs."""
    return {"network_weights": {"w": torch.full((3,), float(step))}, "optimizer_state": {}, "step": step}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights change meanwhile; nothing is due before the writing has ended; a step is written once."""
    may_write, written = threading.Event(), []

    def slowly(folder: Path, state: dict[str, Any], keep: int) -> None:
        assert may_write.wait(60)
        save_latest(folder, state, keep)
        written.append(state["step"])

    monkeypatch.setattr(module, "save_latest", slowly)
    weights = state(1)
    with Saver(tmp_path, minutes=0, keep=2) as saver:
        assert saver.due()
        saver.save(weights)
        weights["network_weights"]["w"].fill_(7)
        assert not saver.due() and not (tmp_path / LATEST).exists()
        may_write.set()
        saver.save(state(1))
        saver.save(state(2))
    assert written == [1, 2]
    assert torch.equal(torch.load(tmp_path / OLDER.format(1))["network_weights"]["w"], torch.ones(3))
    assert torch.load(tmp_path / LATEST)["step"] == 2


def test_what_goes_wrong_in_writing_ends_the_run(tmp_path: Path) -> None:
    """Told at the next look: a folder that is gone, and weights that are not finite."""
    with Saver(tmp_path / "gone", minutes=10, keep=1) as saver:
        assert not saver.due()  # the first one comes after ten minutes
        saver.save(state(1))
        with pytest.raises(OSError, match="gone"):
            saver.wait()
        saver.save({**state(2), "network_weights": {"w": torch.tensor(torch.nan)}})
        with pytest.raises(FloatingPointError, match=r"network_weights\.w is not finite after step 2"):
            saver.save(state(3))
