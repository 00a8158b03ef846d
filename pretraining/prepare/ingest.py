"""Ingesting: every source is read, checked, and linked or written into the raw data set, or refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import SimpleITK as sitk

from nnunetv2_hiendmae.checks import Failed
from nnunetv2_hiendmae.files import atomic_file
from nnunetv2_hiendmae.identity import fingerprint, to_text
from pretraining.prepare.exclude import Exclusion, Judge, take_out
from pretraining.prepare.find import Source, find_sources
from pretraining.prepare.geometry import Refused
from pretraining.prepare.provenance import mark_excluded
from pretraining.prepare.quality import Gate, check_voxels, content_hash
from pretraining.prepare.read import read
from pretraining.prepare.report import THUMBNAILS, Report, Row, save_thumbnail
from pretraining.processes import process_pool

ENDING = ".nii.gz"
IN_FLIGHT = 8
"""Sources handed out per process: the heap is never held as a whole."""


@dataclass(frozen=True)
class Task:
    """What a worker needs."""

    source: Source
    case: str
    folder: str
    """Raw data set."""
    gate: Gate | None


def ingest(heap: Path, folder: Path, name: str, gate: Gate | None, processes: int, judge: Judge) -> Iterator[Row]:
    """Add the heap's volumes to a raw data set; yields each new line of the report.

    Scans that an earlier call accepted are taken out first where their patient is excluded by now.

    Args:
        heap: folder of scans; only read.
        folder: ``nnUNet_raw/DatasetXXX_Name``.
        name: beginning of the case identifiers.
        gate: quality thresholds, or None for none.
        judge: knows the patients of this and other data sets, and those to keep out.

    Raises:
        Failed: stops; what was accepted so far stays.
    """
    for part in ("imagesTr", "unfinished", f"{THUMBNAILS}/cases"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    report = judge.report
    yield from take_out(judge, folder)
    mark_excluded(folder.name, {row.case for row in report.select("refused")})  # now: what follows may take days
    todo = (
        Task(source, source.case(name), str(folder), gate)
        for source in find_sources(heap)
        if not settled(report.rows.get(source.name), source, folder, judge)
    )
    with process_pool(processes) as pool:
        try:
            for task, row in run_tasks(pool, todo, processes):
                row = accept(row, task, folder, judge)
                report.add(row)
                yield row
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    yield from take_out(judge, folder)  # another scan of a patient may have been excluded just now
    judge.note_comparisons()
    shutil.rmtree(folder / "unfinished")
    write_dataset_json(folder, report)


def settled(row: Row | None, source: Source, folder: Path, judge: Judge) -> bool:
    """Whether an earlier run dealt with this very input, and would do the same now."""
    if row is None or row.stamp != source.stamp:
        return False
    if row.status == "refused":
        return not row.identity or bool(judge.objection(row))
    return bool(row.identity) and (folder / "imagesTr" / f"{row.case}_0000{ENDING}").exists()


def run_tasks(pool: ProcessPoolExecutor, tasks: Iterator[Task], processes: int) -> Iterator[tuple[Task, Row]]:
    """Results in the tasks' order, so that the same of two duplicates is accepted every time; a few are in flight."""
    pending: deque[tuple[Task, Future[Row]]] = deque()
    while True:
        try:
            for task in islice(tasks, IN_FLIGHT * processes - len(pending)):
                pending.append((task, pool.submit(look_at, task)))
            if not pending:
                return
            task, future = pending.popleft()
            yield task, future.result()
        except BrokenProcessPool:
            raise Failed("a process was killed (out of memory?); lower -np") from None


def look_at(task: Task) -> Row:
    """Read and check one source; a volume that is accepted lies in ``unfinished`` afterwards."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    source, folder = task.source, Path(task.folder)
    row = Row(input=source.name, status="refused", case=task.case, stamp=source.stamp)
    try:
        image = read(source)
        row = replace(row, size=" × ".join(map(str, image.GetSize())), spacing=spacing_text(image.GetSpacing()))
        save_thumbnail(image, folder / THUMBNAILS / "cases" / f"{task.case}.png")
        if task.gate is not None:
            check_voxels(sitk.GetArrayViewFromImage(image), image.GetSpacing()[::-1], task.gate)
        row = replace(row, **identify(image))
        put(image, source, folder / "unfinished" / f"{task.case}_0000{ENDING}")
        return replace(row, status="accepted")
    except Refused as refusal:
        return replace(row, reason=str(refusal))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failed(f"{folder}: no space left while writing {task.case} from {source.name}") from None
        return replace(row, reason=f"{type(error).__name__}: {error}")
    except Exception as error:  # one bad input must not stop the others; the report names it
        return replace(row, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def put(image: sitk.Image, source: Source, target: Path) -> None:
    """A link to a gzipped 3D NIfTI, else a converted copy. ``Failed`` if it cannot be written."""
    target.unlink(missing_ok=True)
    if not source.is_dicom and source.files[0].lower().endswith(ENDING) and header_size(source.files[0]) == 3:
        os.symlink(os.path.abspath(source.files[0]), target)
        return
    try:
        sitk.WriteImage(image, str(target), useCompression=True)
        sitk.ReadImage(str(target))  # a full disk leaves a short file without an error
    except RuntimeError:
        target.unlink(missing_ok=True)
        raise Failed(f"{target} could not be written; is the disk full?") from None


def header_size(file: str) -> int:
    """Axes that the file declares."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader.GetDimension()


def accept(row: Row, task: Task, folder: Path, judge: Judge) -> Row:
    """Move an accepted volume to its place, or refuse it because of its patient."""
    unfinished = folder / "unfinished" / f"{task.case}_0000{ENDING}"
    if row.status != "accepted":
        (folder / "imagesTr" / unfinished.name).unlink(missing_ok=True)  # it was accepted, before its file changed
        return row
    objection = judge.objection(row)
    if objection:
        unfinished.unlink(missing_ok=True)
        return replace(row, status="refused", reason=objection)
    judge.add(row)
    os.replace(unfinished, folder / "imagesTr" / unfinished.name)
    return row


def identify(image: sitk.Image) -> dict[str, str]:
    """Content hash and fingerprint of a volume, as fields of ``Row``."""
    voxels = sitk.GetArrayViewFromImage(image)
    return {"sha256": content_hash(voxels), "identity": to_text(fingerprint(voxels, image.GetSpacing()[::-1]))}


def spacing_text(spacing: tuple[float, ...]) -> str:
    return " × ".join(f"{s:.4g}" for s in spacing)


def write_dataset_json(folder: Path, report: Report) -> None:
    """nnU-Net's description of the raw data set: one CT channel, no labels."""
    cases = [row.case for row in report.select("accepted")]
    # nnU-Net matches file names of a folder case by case, which is quadratic; a list of files spares it that.
    listed = {c: {"images": [f"imagesTr/{c}_0000{ENDING}"], "label": f"labelsTr/{c}{ENDING}"} for c in cases}
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0},
        "numTraining": len(cases),
        "file_ending": ENDING,
        "name": folder.name,
        "dataset": listed,
    }
    with atomic_file(folder / "dataset.json") as stream:
        stream.write(json.dumps(description, indent=2).encode())


def look_at_excluded(dataset: str, source: Source) -> Exclusion | str:
    """What is noted of a scan to keep out, or a sentence why that is impossible: it must not be passed over."""
    try:
        return Exclusion(dataset=dataset, image=source.name, stamp=source.stamp, **identify(read(source)))
    except Refused as refusal:
        return f"{source.files[0]} cannot be compared ({refusal}). Repair or remove it."
