"""Headers in plain text, NRRD and MetaImage: what ITK fills in or passes over without a word."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretraining.prepare.geometry import Refused, check_spacing, millimetres, same_spacing

NRRD = (".nrrd", ".nhdr")
META = (".mha", ".mhd")
FIELDS = ("space directions", "spacings", "space units", "units", "elementspacing", "elementsize", "transformmatrix")
MAX_LINES = 1000
MILLIMETRES = {"mm", "millimeter", "millimeters", "millimetre", "millimetres", ""}


def check_text_header(file: str) -> None:
    """``Refused`` for a spacing that is missing (ITK takes 1 mm), not positive, in other units, or there twice."""
    name, separator = file.lower(), ":" if file.lower().endswith(NRRD) else "="
    fields: dict[str, str] = {}
    for key, value in read_fields(file, separator):
        if key in FIELDS and fields.setdefault(key, value) != value:
            raise Refused(f"the header has {key} twice, {fields[key]} and {value}; remove the wrong line")
    if name.endswith(NRRD):
        check_nrrd(fields)
    elif name.endswith(META):
        check_meta(fields)


def read_fields(file: str, separator: str) -> Iterator[tuple[str, str]]:
    """Names in lower case, and values, of the lines before the voxels."""
    with open(file, "rb") as stream:
        for _ in range(MAX_LINES):
            line = stream.readline(2**16).decode("latin-1").strip()
            if not line:
                return
            key, found, value = line.partition(separator)
            if found and not line.startswith("#") and not value.startswith("="):  # NRRD: key:=value is a comment
                yield key.strip().lower(), value.strip()
            if key.strip().lower() == "elementdatafile":
                return


def numbers(text: str) -> list[float]:
    """Its numbers; empty if something in it is none."""
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        return []


def check_nrrd(fields: dict[str, str]) -> None:
    """By the definition of NRRD format, sections 5 and 6 (spacings, units, space directions, space units)."""
    if "space directions" not in fields:
        axes = numbers(fields.get("spacings", ""))
        axes = axes if len(axes) <= 3 else [mm for mm in axes if not math.isnan(mm)]  # NaN: an axis without spacing
        if not axes:
            raise Refused("the header has neither space directions nor spacings, for which ITK takes 1 mm; add them")
        check_spacing(axes, "spacings")
    for field in ("units", "space units"):
        for unit in fields.get(field, "").replace('"', " ").split():
            if unit.lower() not in MILLIMETRES:
                raise Refused(f"{field} says {unit}, which ITK takes for mm; store the header in mm")


def check_meta(fields: dict[str, str]) -> None:
    """ElementSpacing (from voxel to voxel) is what ITK reads, ElementSize (of a voxel) where there is no other."""
    names = ("ElementSpacing", "ElementSize")
    given = {name: numbers(fields[name.lower()]) for name in names if name.lower() in fields}
    if not given:
        raise Refused("the header has no ElementSpacing, for which ITK takes 1 mm; add it")
    for name, spacing in given.items():
        check_spacing(spacing, name)
    if len(given) == 2 and not same_spacing(*given.values()):
        first, second = map(millimetres, given.values())
        raise Refused(f"ElementSpacing says {first} mm, ElementSize {second} mm; remove the wrong one")
