"""Long: on real CT a run learns with nothing set but its sizes, and asking the encoder is not behind plain MAE."""

from __future__ import annotations

import json

import pytest
from conftest import World, shared_folder

DATASET = "Dataset500_OpenKBPUnlabelled"
RUN = "hiendmae_pretrain -d 500 -p Plans5mm -device cpu -num_workers 1 -preview_epochs 0 -val_every 100 -batch_size 8"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Thirty head-and-neck CT at 5 mm."""
    world = World(tmp_path_factory.mktemp("learns"))
    source, raw = shared_folder() / "data" / DATASET, world.root / "raw" / DATASET
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "dataset.json").write_bytes((source / "dataset.json").read_bytes())
    for image in sorted((source / "imagesTr").iterdir())[:30]:
        (raw / "imagesTr" / image.name).symlink_to(image)
    world.run("hiendmae_plan_and_preprocess -d 500 -spacing 5 5 5 -p Plans5mm -np 2")
    return world


def share(world: World, name: str, flags: str) -> float:
    """Held-out loss after a run, as a share of that of predicting each patch's mean."""
    world.run(f"{RUN} -run {name} {flags} --stop_on_plateau", OMP_NUM_THREADS="1")
    file = next((world.root / "results").rglob(f"{name}/metrics.jsonl"))
    values = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    last = [v for v in values if "val_loss" in v][-1]
    return last["val_loss"] / last["val_mean_patch_loss"]


@pytest.mark.parametrize(
    ("preset", "crop", "token"),
    [("nano", 32, 8), ("tiny", 32, 8), ("primus_s", 32, 8)],
    ids=lambda value: str(value),
)
def test_learns_within_300_steps(place: World, preset: str, crop: int, token: int) -> None:
    sizes = f"-crop_size {crop} {crop} {crop} -vit_patch_size {token} {token} {token}"
    assert share(place, f"{preset}_{token}", f"-preset {preset} {sizes} -steps 300") < 0.97


def test_hierarchical_is_ahead_of_plain_mae(place: World) -> None:
    flags = "-preset nano -crop_size 24 24 24 -steps 300"
    ours, plain = share(place, "ours", flags), share(place, "plain", f"{flags} -decoder self_attention")
    assert ours < min(0.95, plain)
