"""Who may not come in: patients to keep out, and scans of patients that are there already."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from nnunetv2_hiendmae.files import raw_root
from nnunetv2_hiendmae.identity import Known, from_text
from nnunetv2_hiendmae.patients import PATIENTS, read_patients
from pretraining.prepare.report import REPORT, Report, Row, read_rows

EXCLUSIONS = "ingest_excluded.csv"
TAKEN_OUT = "imagesExcluded"
"""Where images go that an exclusion hits after they were accepted."""
EXCLUDED = "patient to keep out"
SIBLING = f"{EXCLUDED}: another scan of {{}} ({PATIENTS}) is excluded"
DUPLICATE, PATIENT = "duplicate of", "same patient as"


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """One scan to keep out. All that any call named are kept, so that the order of calls does not matter."""

    dataset: str
    image: str
    stamp: str
    sha256: str
    identity: str


def read_exclusions(folder: Path) -> list[Exclusion]:
    """Those of earlier calls."""
    file = folder / EXCLUSIONS
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8") as stream:
        return [Exclusion(**row) for row in csv.DictReader(stream)]


def write_exclusions(folder: Path, exclusions: list[Exclusion]) -> None:
    """The whole table anew."""
    temporary = folder / f"{EXCLUSIONS}.tmp"
    with open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Exclusion)])
        writer.writeheader()
        writer.writerows(map(asdict, exclusions))
    os.replace(temporary, folder / EXCLUSIONS)


class Judge:
    """Says what stands against a scan: who is to be kept out, and who is there, in this data set and in others."""

    def __init__(self, folder: Path, exclusions: list[Exclusion]) -> None:
        self.report = Report(folder)
        self.patients = read_patients(folder)
        self.exclusions = exclusions
        self.excluded = Crowd()
        for e in exclusions:
            self.excluded.add(f"{e.dataset}/{e.image}", e.sha256, e.identity)
        self.present = Crowd()
        for row in self.report.select("accepted"):
            self.add(row)
        for file in sorted(raw_root().glob(f"Dataset*/{REPORT}")):
            if file.parent != folder:
                for row in read_rows(file):
                    if row.status == "accepted":
                        self.present.add(f"{file.parent.name}/{row.case}", row.sha256, row.identity)

    def add(self, row: Row) -> None:
        """A scan that was accepted."""
        self.present.add(row.input, row.sha256, row.identity)

    def objection(self, row: Row) -> str | None:
        """Why a scan cannot be accepted, or None."""
        for name, how in self.excluded.find(row.sha256, row.identity):
            return f"{EXCLUDED}: {how} {name} (--exclude_overlap)"
        patient = self.patients.get(row.case)
        if patient is not None and patient in self.excluded_patients():
            return SIBLING.format(patient)
        for name, how in self.present.find(row.sha256, row.identity):
            other = self.report.rows.get(name)
            if name == row.input or (other is not None and other.status != "accepted"):
                continue
            if other is not None and how == DUPLICATE and other.sha256 != row.sha256:
                continue  # that input was changed since
            if other is not None and how != DUPLICATE and patient and self.patients.get(other.case) == patient:
                continue  # the table says so: two phases or dates of one patient may both be used
            remedy = "" if how == DUPLICATE else f"; if both are to go in, name their patient in {PATIENTS}"
            return f"{how} {name}{remedy}"
        return None

    def excluded_patients(self) -> set[str]:
        """Patients of the table one of whose scans was refused because of an exclusion."""
        if not self.patients:
            return set()
        itself = tuple(f"{EXCLUDED}: {how}" for how in (DUPLICATE, PATIENT))
        hit = (row for row in self.report.rows.values() if row.reason.startswith(itself))
        return {self.patients[row.case] for row in hit if row.case in self.patients}

    def hit_by_exclusions(self) -> list[Row]:
        """Accepted scans that would be refused now; looked for from the side of the exclusions, which are fewer."""
        rows = self.report.rows
        names = {n for e in self.exclusions for n, _ in self.present.find(e.sha256, e.identity) if n in rows}
        gone = self.excluded_patients() | {self.patients[rows[n].case] for n in names if rows[n].case in self.patients}
        names |= {row.input for row in rows.values() if self.patients.get(row.case) in gone}
        return [rows[n] for n in sorted(names) if rows[n].status == "accepted"]

    def note_comparisons(self) -> None:
        """Write into every accepted row with whom it was compared."""
        names = "; ".join(sorted({e.dataset for e in self.exclusions}))
        for row in self.report.select("accepted"):
            self.report.rows[row.input] = replace(row, compared_with=names)
        self.report.write()


class Crowd:
    """Scans by content hash and by fingerprint."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}
        self.known = Known()

    def add(self, name: str, sha256: str, identity: str) -> None:
        self.hashes.setdefault(sha256, name)
        if identity:
            self.known.add(name, from_text(identity))

    def find(self, sha256: str, identity: str) -> Iterator[tuple[str, str]]:
        """Name of each scan that is the same or of the same patient, and in words which of both."""
        if sha256 in self.hashes:
            yield self.hashes[sha256], DUPLICATE
        for name in self.known.find(from_text(identity)) if identity else []:
            if name != self.hashes.get(sha256):
                yield name, PATIENT


def take_out(judge: Judge, folder: Path) -> Iterator[Row]:
    """Move images aside whose patients are excluded by now; yields their new lines. Nothing is deleted."""
    for row in judge.hit_by_exclusions():
        (folder / TAKEN_OUT).mkdir(exist_ok=True)
        reason = judge.objection(row) or SIBLING.format(judge.patients[row.case])
        for image in (folder / "imagesTr").glob(f"{row.case}_0000.*"):
            os.replace(image, folder / TAKEN_OUT / image.name)
        gone = replace(row, status="refused", reason=f"{reason}; taken out to {TAKEN_OUT}", compared_with="")
        judge.report.add(gone)
        yield gone
