"""nnU-Net's fingerprint, plans and preprocessed volumes for data sets without labels.

Reading, cropping, normalising, resampling and writing are nnU-Net's; only what needs a label is replaced: the
fingerprint takes its intensities from the body instead of the foreground. Labels, where present, are ignored.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.channels import channel_names, names_ct
from nnunetv2_hiendmae.files import read_json, read_plans
from nnunetv2_hiendmae.nnunet.planner import HiEndMAEPlanner
from pretraining.prepare.find import Source
from pretraining.prepare.geometry import Refused
from pretraining.prepare.provenance import record_case, recorded_cases, remove_case, remove_excluded
from pretraining.prepare.quality import Gate, check_voxels, content_hash
from pretraining.prepare.raw import Failure, RawDataSet
from pretraining.prepare.read import check_file
from pretraining.processes import process_pool

CONFIGURATION = "3d_fullres"
FINGERPRINT_CASES = 500
"""Cases, drawn by a fixed seed, that the fingerprint looks at: medians need no more."""
BODY_HU = -500
UNFINISHED = "unfinished"
FINGERPRINT = "hiendmae_fingerprint.json"
"""Kept apart from nnU-Net's own, whose intensities are those of labelled voxels."""

REPLAN = "Remove it; this command then plans again."

Spacing = str | tuple[float, ...] | None


def read_case(files: list[str], reader: Any, names: Sequence[str], gate: Gate | None) -> tuple[np.ndarray, Any]:
    """A case's channels ``(C, z, y, x)`` as nnU-Net reads them, and their properties.

    Raises:
        Refused: a file is damaged, its header contradicts itself, channels differ in size or number, there is one slice
            only, or a CT channel cannot be HU.
    """
    sizes = {file: size for file in files if (size := check_file(file)) is not None}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{Path(file).name}: {' × '.join(map(str, size))}" for file, size in sizes.items())
        raise Refused(f"the channels differ in size ({shown}); resample them to one grid")
    image, properties = reader().read_images(files)
    if min(image.shape[1:]) < 2:
        shown = " × ".join(map(str, image.shape[1:]))
        raise Refused(f"a single slice ({shown} voxels): the network is 3D; remove the case")
    if not np.isfinite(image).all():
        raise Refused("NaN or infinite voxels")
    if len(image) != len(names):
        raise Refused(f"{len(image)} channels, not the {len(names)} of dataset.json")
    for channel, name in zip(image, names, strict=True):
        if gate is not None and names_ct(name):
            check_voxels(channel, properties["spacing"], gate)
    return image, properties


def choose_reader(raw: RawDataSet) -> Any:
    """nnU-Net's choice of a reader, which opens an example: the first image that is sound.

    Raises:
        ValueError: there is none.
    """
    reasons = []
    for files in raw.images.values():
        try:
            check_file(files[0])
        except Refused as refusal:
            reasons.append(f"{files[0]}: {refusal}")
            continue
        return determine_reader_writer_from_dataset_json(raw.description, files[0], verbose=False)
    raise ValueError(f"No case of {raw.folder.name} could be read; the first: {reasons[0]}.")


def fingerprint_case(files: list[str], reader: Any, names: Sequence[str], gate: Gate | None) -> dict[str, Any]:
    """Shape after nnU-Net's crop, spacing, and intensities of the body."""
    image, properties = read_case(files, reader, names, gate)
    cropped, _, _ = crop_to_nonzero(image)
    channels = [channel[channel > BODY_HU] for channel in cropped]
    channels = [values if values.size else whole.ravel() for values, whole in zip(channels, cropped, strict=True)]
    return {
        "shape": [int(n) for n in cropped.shape[1:]],
        "spacing": [float(s) for s in properties["spacing"]],
        "relative_size": float(np.prod(cropped.shape[1:]) / np.prod(image.shape[1:])),
        "channels": [
            {
                "mean": float(v.mean()), "std": float(v.std()), "min": float(v.min()), "max": float(v.max()),
                **dict(zip(("percentile_00_5", "median", "percentile_99_5"), np.percentile(v, (0.5, 50, 99.5)).tolist(), strict=True)),  # noqa: E501
            }
            for v in channels
        ],
    }  # fmt: skip


def find_fingerprint(
    raw: RawDataSet, output: Path, processes: int, gate: Gate | None
) -> tuple[dict[str, Any], list[Failure]]:
    """The data set's fingerprint, from an earlier call or made now, and the cases that could not be read for it.

    Raises:
        ValueError: no case could be read.
    """
    if (output / FINGERPRINT).is_file():
        return read_json(output / FINGERPRINT, "Remove it; it is then made again."), []
    reader = choose_reader(raw)
    order = np.random.default_rng(0).permutation(list(raw.images))[:FINGERPRINT_CASES].tolist()
    results, failures = [], []
    for case, result in in_processes(
        fingerprint_case, {c: (raw.images[c], reader, raw.channels, gate) for c in order}, processes
    ):
        if isinstance(result, str):
            failures.append(Failure(case, raw.images[case][0], result))
        else:
            results.append(result)
    if not results:
        first = failures[0]
        raise ValueError(f"No case of {raw.folder.name} could be read; the first: {first.file}: {first.reason}.")
    output.mkdir(parents=True, exist_ok=True)
    fingerprint = merge_fingerprints(results)
    save_json(fingerprint, str(output / FINGERPRINT))
    return fingerprint, failures


def make_plans(raw: RawDataSet, plans_file: Path, spacing: Spacing, processes: int, gate: Gate | None) -> list[Failure]:
    """Write plans, or keep those that are there; returns the cases that could not be read.

    ``spacing`` is in mm in nnU-Net's axis order, or "median"; None keeps that of existing plans, else means 1.5 mm.

    Raises:
        ValueError: no case could be read, or existing plans have another spacing.
    """
    output = plans_file.parent
    fingerprint, failures = find_fingerprint(raw, output, processes, gate)
    wanted = np.median(fingerprint["spacings"], 0) if spacing == "median" else spacing
    if plans_file.is_file():
        made = plan_spacing(plans_file)
        if wanted is not None and not np.allclose(made, wanted, atol=1e-3):
            asked = " ".join(f"{float(mm):g}" for mm in wanted)
            raise ValueError(
                f"{plans_file} was made for a spacing of {' '.join(f'{mm:g}' for mm in made)} mm, not {asked}; one "
                f"folder must not mix them. Choose another name with -p, or leave -spacing out."
            )
        return failures
    save_json(raw.description, str(output / "dataset.json"), sort_keys=False)
    nnunets = output / "dataset_fingerprint.json"
    borrowed = not nnunets.is_file()
    if borrowed:
        save_json(fingerprint, str(nnunets))
    planner = HiEndMAEPlanner(
        output.name,
        plans_name=plans_file.stem,
        overwrite_target_spacing=None if wanted is None else tuple(float(mm) for mm in wanted),
    )
    reader = choose_reader(raw)
    planner.determine_reader_writer = lambda: reader
    try:
        with redirect_stdout(StringIO()):  # nnU-Net prints whole plans
            planner.plan_experiment()
    finally:
        if borrowed and raw.is_labelled:
            nnunets.unlink()  # nnU-Net must make its own, of intensities in the foreground
    return failures


def plan_spacing(plans_file: Path) -> list[float]:
    """Spacing of the plans in mm, in the axis order of the images."""
    plans = read_plans(plans_file, REPLAN)
    spacing = plans["configurations"][CONFIGURATION]["spacing"]
    return [float(spacing[axis]) for axis in plans["transpose_backward"]]


def merge_fingerprints(results: list[dict[str, Any]]) -> dict[str, Any]:
    """nnU-Net's dataset_fingerprint.json; of intensities, medians over the cases of each case's statistics."""
    names = results[0]["channels"][0]
    merge = {"min": np.min, "max": np.max}
    return {
        "spacings": [r["spacing"] for r in results],
        "shapes_after_crop": [r["shape"] for r in results],
        "foreground_intensity_properties_per_channel": {
            str(i): {n: float(merge.get(n, np.median)([r["channels"][i][n] for r in results])) for n in names}
            for i in range(len(results[0]["channels"]))
        },
        "median_relative_size_after_cropping": float(np.median([r["relative_size"] for r in results])),
    }


def preprocess(
    raw: RawDataSet, plans_file: Path, processes: int, part: tuple[int, int], gate: Gate | None
) -> Iterator[Failure | str]:
    """Preprocess the cases of one part that are not done; yields each case's name, or what went wrong with it.

    ``part`` is (part_id, num_parts). A case appears under its name when it is complete.
    """
    plans = PlansManager(read_plans(plans_file, REPLAN))
    folder = volume_folder(plans_file)
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    remove_excluded(folder)
    part_id, num_parts = part
    mine = list(raw.images)[part_id::num_parts]
    stamps = {e["case"]: e["stamp"] for e in recorded_cases(folder.parent) if e.get("volumes") == folder.name}
    for case in mine:
        if case in stamps and stamps[case] != stamp_of(raw.images[case]):
            remove_case(folder, case)  # made of other files
    settings = plans.plans, raw.description, str(folder), part_id, gate
    todo = {case: (case, raw.images[case], *settings) for case in mine if not is_done(folder, case)}
    yield from (case for case in mine if case not in todo)
    for case, result in in_processes(preprocess_case, todo, processes):
        if isinstance(result, str):
            yield Failure(case, raw.images[case][0], result)
        else:
            yield case


def stamp_of(files: list[str]) -> str:
    """Changes when a case's files do."""
    return Source("", tuple(files)).stamp


def volume_folder(plans_file: Path) -> Path:
    """Where the volumes of plans by ``HiEndMAEPlanner`` are."""
    return plans_file.parent / f"{plans_file.stem}_{CONFIGURATION}"


def is_done(folder: Path, case: str) -> bool:
    """Whether a case was preprocessed before and its files can be opened."""
    files = [folder / f"{case}{end}" for end in (".b2nd", "_seg.b2nd", ".pkl")]
    if not all(f.is_file() and f.stat().st_size for f in files):
        return False
    try:
        shapes = {blosc2.open(urlpath=str(f), mode="r").shape[1:] for f in files[:2]}
    except (RuntimeError, OSError, ValueError):
        return False
    return len(shapes) == 1


def preprocess_case(
    case: str,
    files: list[str],
    plans: dict[str, Any],
    description: dict[str, Any],
    folder: str,
    part_id: int,
    gate: Gate | None,
) -> None:
    """nnU-Net's preprocessing of one case without a label; it is recorded before it counts as done."""
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    preprocessor = configuration.preprocessor_class(verbose=False)
    stamp = stamp_of(files)
    image, properties = read_case(files, manager.image_reader_writer_class, channel_names(description), gate)
    digest = content_hash(image[0])
    data, seg, properties = preprocessor.run_case_npy(image, None, properties, manager, configuration, description)
    unfinished, target = Path(folder) / UNFINISHED / case, Path(folder) / case
    for end in (".b2nd", "_seg.b2nd", ".pkl"):
        Path(f"{unfinished}{end}").unlink(missing_ok=True)
    preprocessor.run_case = lambda *_: (data, seg, properties)
    preprocessor.run_case_save(str(unfinished), files, None, manager, configuration, description)
    spacing = [float(s) for s in properties["spacing"]]
    entry = {"case": case, "sha256": digest, "spacing": spacing, "volumes": Path(folder).name, "stamp": stamp}
    record_case(Path(folder).parent, part_id, entry)
    for end in ("_seg.b2nd", ".pkl", ".b2nd"):  # the volume last: its name is what makes a case count
        os.replace(f"{unfinished}{end}", f"{target}{end}")


def in_processes(
    function: Callable[..., Any], tasks: dict[str, tuple[Any, ...]], processes: int
) -> Iterator[tuple[str, Any]]:
    """``function(*tasks[name])`` in processes; yields each name with its result, or with a sentence if it failed.

    Raises:
        OSError: a process was killed, or the disk is full.
    """
    with process_pool(processes) as pool:
        try:
            futures = {pool.submit(attempt, function, arguments): name for name, arguments in tasks.items()}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise OSError("a process was killed (out of memory?); lower -np") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A result, or in a sentence why there is none: one bad case must not stop the others. A full disk does."""
    try:
        return function(*arguments)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return f"{type(error).__name__}: {error}"
    except Refused as refusal:
        return str(refusal)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1][:200] if lines else 'no reason given'}"
