"""Writing and checking packed corpora."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_hiendmae.files import atomic_file
from pretraining.data.b2nd import PreprocessedCorpus
from pretraining.data.corpus import air_values, canonical_volume, find_body_cells
from pretraining.data.packed import (
    DTYPES,
    FORMAT_VERSION,
    INDEX,
    INDEX_ARRAYS,
    PackedCorpus,
    quantise,
    shard_file,
)
from pretraining.processes import process_pool

CASES_PER_SHARD = 64
PLAN = "pack.json"


def pack(corpus: PreprocessedCorpus, folder: Path, bits: int, processes: int) -> Iterator[tuple[int, list[str]]]:
    """Write every shard that is not there yet, then the index.

    Yields:
        After each shard: cases done, and a line for each case that could not be packed so far.

    Raises:
        ValueError: the folder was begun with other cases or settings; names what differs.
        OSError: a process was killed, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin_or_continue(corpus, folder, bits)
    shards = [range(i, min(i + CASES_PER_SHARD, len(corpus))) for i in range(0, len(corpus), CASES_PER_SHARD)]
    marks = [[mark_of(corpus, case) for case in cases] for cases in shards]
    if not all(is_packed(folder, i, mine) for i, mine in enumerate(marks)):
        (folder / INDEX).unlink(missing_ok=True)  # it would point into shards that are written anew
    done, failures = 0, []
    with process_pool(processes) as pool:
        try:
            tasks = [(corpus.subset(cases), folder, bits, i, marks[i]) for i, cases in enumerate(shards)]
            jobs = {pool.submit(pack_shard, *task): cases for task, cases in zip(tasks, shards, strict=True)}
            for job in as_completed(jobs):
                failures += job.result()
                done += len(jobs[job])
                yield done, failures
        except BrokenProcessPool:
            raise OSError("a process was killed (out of memory?); lower -np") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_index(corpus, folder, bits, len(shards))


def begin_or_continue(corpus: PreprocessedCorpus, folder: Path, bits: int) -> None:
    """Note what is being packed, or compare with what was begun."""
    names = "\n".join(corpus.name(i) for i in range(len(corpus)))
    plan = {
        "bits": bits,
        "window_hu": list(corpus.sources[0].window),
        "sources": [str(d.folder) for d in corpus.sources],
        "spacings": [list(d.spacing) for d in corpus.sources],
        "cases": len(corpus),
        "cases_crc32": zlib.crc32(names.encode()),
    }
    file = folder / PLAN
    if file.is_file():
        begun = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{k}: {begun.get(k)} → {plan[k]}" for k in plan if begun.get(k) != plan[k]]
        if changed:
            raise ValueError(f"{folder} was begun with other settings ({'; '.join(changed)}). Choose another -o.")
    else:
        with atomic_file(file) as stream:
            stream.write(json.dumps(plan, indent=2).encode())


def mark_of(corpus: PreprocessedCorpus, case: int) -> int:
    """``content_mark``; -1 for a volume that cannot be read, which packing then says."""
    with suppress(ValueError):
        return corpus.content_mark(case)
    return -1


def pack_shard(corpus: PreprocessedCorpus, folder: Path, bits: int, shard: int, marks: list[int]) -> list[str]:
    """Write one shard; its entries file appears last and marks it finished. Returns a line for each bad case."""
    if is_packed(folder, shard, marks):
        return []
    entries: list[dict[str, Any]] = []
    failures, body = [], [np.empty((0, 3), np.int16)]
    voxel_start = body_start = 0
    with atomic_file(shard_file(folder, shard, "voxels")) as stream:
        for case in range(len(corpus)):
            try:
                stored = corpus.read(case, (0, 0, 0), corpus.shape(case))
            except ValueError as error:
                failures.append(str(error))
                continue
            canonical = canonical_volume(stored, corpus.intensity(case))
            cells = find_body_cells(canonical, air_values(corpus.cases[case][0].channels))
            voxels = quantise(canonical, bits)
            stream.write(voxels.data)
            entries.append(describe(corpus, case, shard, voxels, cells, voxel_start, body_start))
            body.append(cells)
            voxel_start, body_start = voxel_start + voxels.size, body_start + len(cells)
    with atomic_file(shard_file(folder, shard, "body.npy")) as stream:
        np.save(stream, np.concatenate(body))
    with atomic_file(shard_file(folder, shard, "entries.json")) as stream:
        stream.write(json.dumps({"entries": entries, "failures": failures, "marks": marks}).encode())
    return failures


def is_packed(folder: Path, shard: int, marks: list[int]) -> bool:
    """Whether a shard is there with all of its cases, made of the volumes that have these ``content_mark``."""
    file = shard_file(folder, shard, "entries.json")
    if not file.is_file():
        return False
    made = json.loads(file.read_text(encoding="utf-8"))
    return not made["failures"] and made.get("marks", marks) == marks  # an earlier version noted none


def describe(
    corpus: PreprocessedCorpus,
    case: int,
    shard: int,
    voxels: np.ndarray,
    cells: np.ndarray,
    voxel_start: int,
    body_start: int,
) -> dict[str, Any]:
    """One case's line of the index."""
    source, name = corpus.cases[case]
    return {
        "name": name,
        "dataset": next(i for i, d in enumerate(corpus.sources) if d is source),
        "shape": list(voxels.shape[1:]),
        "crc32": zlib.crc32(voxels.data),
        "shard": shard,
        "voxel_start": voxel_start,
        "body_start": body_start,
        "body_count": len(cells),
    }


def write_index(corpus: PreprocessedCorpus, folder: Path, bits: int, num_shards: int) -> None:
    """Gather the shards' entries, in order, into the index."""
    entries: list[dict[str, Any]] = []
    for shard in range(num_shards):
        entries += json.loads(shard_file(folder, shard, "entries.json").read_text(encoding="utf-8"))["entries"]
    if not entries:
        raise ValueError(f"No case could be packed into {folder}.")
    datasets = [
        {
            "name": d.name,
            "num_cases": sum(e["dataset"] == i for e in entries),
            "spacing": list(d.spacing),
            "air": quantise(air_values(d.channels), bits).tolist(),
        }
        for i, d in enumerate(corpus.sources)
    ]
    header = {
        "version": FORMAT_VERSION,
        "bits": bits,
        "window_hu": list(corpus.sources[0].window),
        "in_channels": corpus.in_channels,
        "datasets": datasets,
    }
    save_index(folder, header, entries)


def save_index(folder: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """``index.npz`` with one row a case, then ``index.json``, whose presence marks the corpus finished."""
    names = [e["name"].encode() for e in entries]
    kinds = {
        "dataset": np.int16, "shape": np.int32, "crc32": np.uint32, "shard": np.int32,
        "voxel_start": np.int64, "body_start": np.int64, "body_count": np.int32,
    }  # fmt: skip
    arrays = {key: np.array([e[key] for e in entries], dtype) for key, dtype in kinds.items()}
    arrays["names"] = np.frombuffer(b"".join(names), np.uint8)
    arrays["name_ends"] = np.cumsum([len(n) for n in names])
    with atomic_file(folder / INDEX_ARRAYS) as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    with atomic_file(folder / INDEX) as stream:
        stream.write(json.dumps(header, indent=2).encode())


def verify(corpus: PackedCorpus) -> Iterator[str | None]:
    """Check every case against its checksum; yields None or what is wrong, case by case."""
    for case in range(len(corpus)):
        try:
            whole = corpus.volume(case)
            yield (
                None
                if zlib.crc32(np.ascontiguousarray(whole).data) == corpus.index["crc32"][case]
                else (
                    f"{corpus.name(case)} in {shard_file(corpus.folder, int(corpus.index['shard'][case]), 'voxels')} "
                    f"differs from its checksum"
                )
            )
            cells = corpus.body_cells(case)
            if len(cells) != corpus.index["body_count"][case]:
                yield f"{corpus.name(case)}: its body cells are cut off"
        except ValueError as error:
            yield str(error)


def packed_bytes(corpus: PackedCorpus) -> int:
    """Bytes of all voxels."""
    return int(corpus.index["shape"].astype(np.int64).prod(1).sum()) * corpus.in_channels * DTYPES[corpus.bits].itemsize
