"""The cases that a run is tied to: its crops are numbered through them, and some are held out."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nnunetv2_hiendmae.files import atomic_file, read_json
from nnunetv2_hiendmae.patients import PATIENTS
from pretraining.data.corpus import Corpus

CASES = "cases.json"
TOGETHER = 256
READERS = 16
"""Files read at once: on network storage each answers after about a millisecond."""
NAMED = 5


def case_marks(corpus: Corpus) -> dict[str, int]:
    """A mark of each case's content and intensities by its name, in the order of the corpus.

    About 0.1 ms a case on a local disk, so 10 s for 100,000; none of it for a packed corpus, whose index has it.
    """

    def marks_of(first: int) -> list[int]:
        some = range(first, min(first + TOGETHER, len(corpus)))
        return [zlib.crc32(corpus.intensity(case).tobytes(), corpus.content_mark(case)) for case in some]

    with ThreadPoolExecutor(READERS) as pool:
        marks = [mark for some in pool.map(marks_of, range(0, len(corpus), TOGETHER)) for mark in some]
    return {corpus.name(case): mark for case, mark in enumerate(marks)}


def record_cases(folder: Path, cases: dict[str, int], held_out: list[str]) -> None:
    """Write ``cases.json`` into a run's folder: marks of all cases, and which of them are held out."""
    with atomic_file(folder / CASES) as stream:
        stream.write(json.dumps({"held_out": held_out, "cases": cases}, indent=0).encode())


def refuse_other_cases(folder: Path, cases: dict[str, int], held_out: list[str]) -> None:
    """Compare with what ``record_cases`` wrote when the run was started.

    Raises:
        ValueError: cases were added, removed or changed, come in another order, or are held out otherwise; names them
            and the remedy.
    """
    file = folder / CASES
    if not file.is_file():  # started by a version that did not record them
        print(f"WARNING: {folder} does not record the cases of its start; they are not compared, only recorded now.")
        return
    record = read_json(file, "Remove it to continue without comparing the cases.")
    saved = record.get("cases", record)  # an earlier version wrote the marks alone
    differing = {
        "added": [name for name in cases if name not in saved],
        "removed": [name for name in saved if name not in cases],
        "changed": [name for name in cases if saved.get(name, cases[name]) != cases[name]],
    }
    changes = [f"{len(names)} {how} ({shown(names)})" for how, names in differing.items() if names]
    if not changes and list(saved) != list(cases):
        changes = ["they come in another order"]
    if not changes and record.get("held_out", held_out) != held_out:
        changes = [f"{PATIENTS} in nnUNet_raw has changed or is not there, so that others are held out"]
    if changes:
        raise ValueError(
            f"--c: the cases are not those that the run in {folder} was started with: {'; '.join(changes)}. Its crops "
            f"would be numbered anew and held-out cases trained on. Restore the data as they were, or start another "
            f"run with -run NAME."
        )


def shown(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
