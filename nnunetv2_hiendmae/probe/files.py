"""The probe of weights files, each beside random weights of its architecture, as a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import torch

from nnunetv2_hiendmae.architectures.encoder import Encoder, untrained
from nnunetv2_hiendmae.probe.labelled import Labelled
from nnunetv2_hiendmae.probe.linear import MEAN, Probe
from nnunetv2_hiendmae.weights.file import Weights, build_encoder
from nnunetv2_hiendmae.weights.read import read_weights

SEED = 0
"""Of the random weights."""
Row = dict[str, str | float]
"""``weights``: file, or what else it is; then the probe's values."""


def open_weights(file: Path) -> Weights:
    """Of any form that can be read. ``ValueError`` as ``read_weights``."""
    try:
        imported = read_weights(file)
    except ValueError as error:
        raise ValueError(f"{error} To say what the file does not, use 'hiendmae_import_weights' first.") from None
    return Weights(file, imported.encoder, imported.header)


def probe_file(file: Path, dataset: str, plans: str, configuration: str, device: torch.device) -> Iterator[Row]:
    """The rows of a file and of random weights. ``ValueError`` if the data set does not fit the weights."""
    weights = open_weights(file)
    labelled = Labelled.open(dataset, plans, configuration, weights.window_hu)
    labelled.check(weights.header.get("spacing", {}).values(), weights.architecture.in_channels)
    encoder = build_encoder(weights).to(device)
    h, w, d = weights.header["img_size"]
    probe = Probe(labelled, (h, w, d), weights.architecture.patch_size)
    networks: dict[str, Encoder] = {str(file): encoder, f"random weights for {file}": untrained(encoder, SEED)}
    for name, network in networks.items():
        yield {"weights": name, **probe(network)}


def table(rows: list[Row]) -> str:
    """For people: an organ a line, a network a column."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "weights"))
    shown = {name: "mean" if name == MEAN else name.removeprefix(f"{MEAN}/") for name in names}
    width = max(map(len, shown.values()))
    columns = "\n".join(f"[{i}] {row['weights']}" for i, row in enumerate(rows, 1))
    head = " " * width + "".join(f"{f'[{i}]':>8}" for i in range(1, len(rows) + 1))
    lines = [
        f"{shown[name]:{width}}" + "".join(f"{row[name]:8.3f}" if name in row else f"{'-':>8}" for row in rows)
        for name in names
    ]
    return "\n".join([columns, head, *lines])


def write_csv(rows: list[Row], file: Path) -> None:
    """A network a line."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
