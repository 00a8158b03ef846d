"""Crops from nnU-Net's preprocessed files: where they lie, what their values mean, that they repeat."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATASET, World
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from pretraining.config import PRESETS, RunConfig
from pretraining.data import loader
from pretraining.data.b2nd import DataSet, PreprocessedCorpus, keep
from pretraining.data.corpus import canonical_volume, choose_start
from pretraining.data.loader import MicroBatches, train_loader
from pretraining.data.stream import CropStream, collate, split_cases, steps_of_epochs

Size = tuple[int, int, int]

WINDOW = (-175.0, 250.0)
CROP = (24, 32, 40)


@pytest.fixture
def corpus(world: World, monkeypatch: pytest.MonkeyPatch) -> PreprocessedCorpus:
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / kind))
    return PreprocessedCorpus([DataSet.open("901", "nnUNetPlans", "3d_fullres", WINDOW)])


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(
        datasets=(DATASET,),
        plans="nnUNetPlans",
        configuration="3d_fullres",
        model=PRESETS["tiny"].model(crop_size=CROP, patch_size=(8, 8, 8), in_channels=1, mask_ratio=0.75),
        steps=5,
        batch_size=3,
        crops_per_case=2,
    )


def canonical(corpus: PreprocessedCorpus, case: int, start: Size, size: Size) -> np.ndarray:
    return canonical_volume(corpus.read(case, start, size), corpus.intensity(case))


def test_values_are_canonical_hu(world: World, corpus: PreprocessedCorpus) -> None:
    """The phantoms are not resampled, so what is read must be the raw HU in the window, up to the plan's clip."""
    raw = world.root / "raw" / DATASET / "imagesTr" / f"{corpus.sources[0].cases[2]}_0000.nii.gz"
    hu = SimpleITKIO().read_images([str(raw)])[0]  # (1, z, y, x)
    shape = corpus.shape(2)
    low, high = corpus.sources[0].channels[0].clip_hu
    expected = (np.clip(hu, max(low, WINDOW[0]), min(high, WINDOW[1])) - WINDOW[0]) / 425
    assert corpus.datasets[0].spacing == (8.0, 6.0, 6.0)
    np.testing.assert_allclose(canonical(corpus, 2, (0, 0, 0), shape), expected, atol=1e-5)


def test_crop_beyond_the_volume_is_padded_with_air(corpus: PreprocessedCorpus) -> None:
    h, w, d = corpus.shape(0)
    crop = canonical(corpus, 0, (-2, 3, -1), (h + 5, w - 3, d + 4))
    np.testing.assert_array_equal(crop[:, 2 : h + 2, :, 1 : d + 1], canonical(corpus, 0, (0, 3, 0), (h, w - 3, d)))
    np.testing.assert_allclose(crop[:, :2], corpus.sources[0].channels[0].air, atol=1e-6)


def test_starts_lie_inside_and_on_tissue(corpus: PreprocessedCorpus) -> None:
    rng, shape = np.random.default_rng(0), corpus.shape(1)
    starts = np.array([choose_start(corpus, rng, 1, (8, 8, 8), 1.0) for _ in range(300)])
    assert (starts >= 0).all() and (starts + 8 <= shape).all()
    anywhere = [choose_start(corpus, rng, 1, (8, 8, 8), 0.0) for _ in range(300)]
    threshold = corpus.sources[0].channels[0].air + 0.01
    share = [
        [(canonical(corpus, 1, tuple(s), (8, 8, 8)) > threshold).mean() for s in many] for many in (starts, anywhere)
    ]
    assert np.mean(share[0]) > np.mean(share[1]) + 0.1
    assert min(share[0]) > 0 == min(share[1])
    big = choose_start(corpus, rng, 1, (shape[0] + 6, 8, 8), 1.0)
    assert -6 <= big[0] <= 0


def test_crops_do_not_depend_on_workers(
    corpus: PreprocessedCorpus, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = CropStream(corpus, config, split_cases(corpus, 41)[0])
    monkeypatch.setattr(loader, "CHUNK_BYTES", 2 * corpus.dtype.itemsize * CROP[0] * CROP[1] * CROP[2])
    for num_workers in (0, 2):
        batches = train_loader(stream, MicroBatches(2, 9, 6, 2), num_workers, pin_memory=False)
        taken = [{name: values.clone() for name, values in batch.items()} for batch in batches]
        assert len(taken) == 14 and taken[0]["image"].shape == (3, 1, *CROP)
        for numbers, batch in zip(MicroBatches(2, 9, 6, 2), taken, strict=True):  # chunks of 2 and 1
            expected = collate([stream[i] for i in numbers])
            assert set(batch) == set(expected)
            assert all(torch.equal(values, batch[name]) for name, values in expected.items())


def test_cases_alternate_in_passes(corpus: PreprocessedCorpus, config: RunConfig) -> None:
    cases = split_cases(corpus, 41)[0]
    stream = CropStream(corpus, config, cases)
    seen = [int(stream[i]["case"]) for i in range(4 * len(cases))]
    assert seen[::2] == seen[1::2]  # crops_per_case=2
    passes = [seen[: 2 * len(cases) : 2], seen[2 * len(cases) :: 2]]
    assert sorted(passes[0]) == sorted(passes[1]) == cases
    assert passes[0] != passes[1]
    assert not np.array_equal(stream[0]["ids_shuffle"], stream[1]["ids_shuffle"])


def test_split_and_steps(corpus: PreprocessedCorpus) -> None:
    train, held_out = split_cases(corpus, 41)
    assert sorted(train + held_out) == list(range(6)) and len(held_out) == 1
    assert steps_of_epochs(1000, 9600, 768, 8) == 100_000


def test_damaged_volume_is_named(corpus: PreprocessedCorpus, tmp_path: Path) -> None:
    (tmp_path / "broken.b2nd").write_bytes(b"not a volume")
    source = replace(corpus.sources[0], name="Dataset902_Broken", folder=tmp_path, cases=("broken",))
    broken = PreprocessedCorpus([source])
    with pytest.raises(ValueError, match=r"Cannot read .*broken\.b2nd"):
        broken.read(0, (0, 0, 0), (8, 8, 8))


def test_processes_that_meet_at_a_case_leave_a_whole_body_map(corpus: PreprocessedCorpus, tmp_path: Path) -> None:
    cells = corpus.body_cells(0)
    file = tmp_path / "body" / "case.npy"
    with ProcessPoolExecutor(4) as pool:
        jobs = [pool.submit(keep, np.repeat(cells, 50_000, axis=0), file) for _ in range(40)]
        while not all(job.done() for job in jobs):
            if file.is_file():
                assert len(np.load(file)) == 50_000 * len(cells)
        assert all(job.exception() is None for job in jobs)
    assert [f.name for f in file.parent.iterdir()] == ["case.npy"]


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_ranks_and_micro_batches_share_a_step(accumulate: int, world_size: int) -> None:
    """Together they take each crop of a step once, in parts of equal size."""
    parts = [list(MicroBatches(5, 7, 24, accumulate, rank, world_size)) for rank in range(world_size)]
    assert all(len(part) == 2 * accumulate for part in parts)
    assert {len(batch) for part in parts for batch in part} == {24 // accumulate // world_size}
    for step in range(2):
        crops = [i for part in parts for batch in part[step * accumulate : (step + 1) * accumulate] for i in batch]
        assert sorted(crops) == list(range((5 + step) * 24, (6 + step) * 24))
