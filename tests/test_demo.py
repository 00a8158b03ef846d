"""Long: ``hiendmae_demo`` as the README shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import World
from matplotlib.image import imread

from pretraining.demo import prepare_folder
from pretraining.phantom import LABELS


@pytest.mark.slow
def test_demo_ends_with_table_and_picture(tmp_path: Path) -> None:
    log = World(tmp_path).run(f"hiendmae_demo -o {tmp_path / 'demo'}")
    dice = {
        line.split()[0]: float(line.split()[1]) for line in log.splitlines() if line.strip().startswith(tuple(LABELS))
    }
    assert set(dice) == set(LABELS) - {"background"}
    assert dice["spine"] > 0.3, log
    picture = imread(tmp_path / "demo" / "demo.png")
    assert picture.std() > 0.1
    assert not any((tmp_path / kind).exists() for kind in ("raw", "preprocessed", "results"))


def test_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="the folder holds other files"):
        prepare_folder(tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]
