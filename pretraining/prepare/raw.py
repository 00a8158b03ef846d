"""nnU-Net's raw data sets: which cases have all their files, and which lack one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.channels import channel_names
from nnunetv2_hiendmae.files import raw_folder, read_json

Images = dict[str, list[str]]


@dataclass(frozen=True)
class Failure:
    """A case that could not be used."""

    case: str
    file: str
    reason: str


@dataclass(frozen=True)
class RawDataSet:
    """A raw data set and the image files of each training case, one a channel."""

    folder: Path
    description: dict[str, Any]
    """dataset.json without its list of files."""
    images: Images
    """Of the cases that have every channel."""
    labels: dict[str, str]
    """Where each case's label belongs, whether it is there or not."""
    incomplete: list[Failure]
    """Cases that lack a channel, or have one too many."""

    @classmethod
    def open(cls, dataset: str) -> RawDataSet:
        """One pass over the folder.

        Raises:
            ValueError: no such data set, no dataset.json, or no case with all its images.
        """
        folder = raw_folder(dataset)
        description = read_json(folder / "dataset.json", "nnU-Net describes a data set there; see its documentation.")
        missing = [key for key in ("channel_names", "file_ending") if key not in description]
        if missing:
            raise ValueError(f"{folder / 'dataset.json'} lacks {' and '.join(missing)}; see nnU-Net's documentation.")
        listed, ending = description.pop("dataset", None), description["file_ending"]
        found = find_images(folder, ending) if listed is None else listed_images(folder, listed)
        if not found:
            raise ValueError(f"{folder / 'imagesTr'} holds no images named CASE_0000{ending}.")
        labels = {case: str(folder / "labelsTr" / f"{case}{ending}") for case in found}
        if listed is not None:
            labels |= {case: expand(folder, listed[case]["label"]) for case in found if "label" in listed[case]}
        channels = description["channel_names"]
        wanted = {
            case: [str(folder / "imagesTr" / f"{case}_{c:04d}{ending}") for c in range(len(channels))]
            if listed is None
            else files
            for case, files in found.items()
        }
        checked = {case: check_case(case, files, wanted[case], channels) for case, files in found.items()}
        incomplete = [failure for failure in checked.values() if failure is not None]
        images = {case: wanted[case] for case in found if checked[case] is None}
        if not images:
            first = incomplete[0]
            raise ValueError(f"No case of {folder.name} has all its images; the first: {first.file}: {first.reason}.")
        return cls(folder, description, images, labels, incomplete)

    @property
    def channels(self) -> list[str]:
        """Names of the image channels."""
        return channel_names(self.description)

    @property
    def is_labelled(self) -> bool:
        """Whether any case has a label."""
        return any(os.path.isfile(label) for label in self.labels.values())

    @property
    def without_label(self) -> list[str]:
        """The label files that are not there."""
        return [label for label in self.labels.values() if not os.path.isfile(label)]


def find_images(folder: Path, ending: str) -> Images:
    """The files in imagesTr named CASE_0000, CASE_0001, …"""
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending))
    images: Images = {}
    for name in sorted(os.listdir(folder / "imagesTr")) if (folder / "imagesTr").is_dir() else []:
        match = pattern.fullmatch(name)
        if match:
            images.setdefault(match[1], []).append(str(folder / "imagesTr" / name))
    return images


def listed_images(folder: Path, listed: dict[str, Any]) -> Images:
    """The files that dataset.json lists under "dataset"; ``ValueError`` for an entry without images."""
    for case, entry in listed.items():
        if not isinstance(entry, dict) or not entry.get("images"):
            raise ValueError(f"{folder / 'dataset.json'} lists no images of {case}; see nnU-Net's documentation.")
    return {case: [expand(folder, file) for file in listed[case]["images"]] for case in sorted(listed)}


def expand(folder: Path, file: str) -> str:
    """A listed path as nnU-Net understands it: with environment variables, relative to the data set."""
    return os.path.abspath(folder / os.path.expandvars(file))


def check_case(case: str, files: list[str], wanted: list[str], channels: dict[str, str]) -> Failure | None:
    """What is wrong with a case's list of files."""
    for channel, file in enumerate(wanted):
        if not os.path.lexists(file):  # a link to nowhere is reported by whoever reads it
            name = channels.get(str(channel), "unnamed")
            reason = f"missing: channel {channel} ({name}) of case {case}; add it, or remove the case's other files"
            return Failure(case, file, reason)
    surplus = sorted(set(files) - set(wanted)) or wanted[len(channels) :]
    if surplus:
        reason = f"case {case} has more channels than the {len(channels)} of dataset.json; remove it, or name it there"
        return Failure(case, surplus[0], reason)
    if len(wanted) < len(channels):
        reason = f"dataset.json lists {len(wanted)} images of case {case}, and names {len(channels)} channels; list all"
        return Failure(case, wanted[0], reason)
    return None
