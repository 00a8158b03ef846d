"""One way to open a corpus, whichever back end holds it. A new back end is one file, and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2_hiendmae.files import preprocessed_root
from nnunetv2_hiendmae.intensity import Window
from pretraining.data.b2nd import open_b2nd
from pretraining.data.corpus import Corpus
from pretraining.data.packed import PackedCorpus


def open_corpus(
    datasets: Sequence[str] | None,
    packed: str | Path | None,
    plans: str | None,
    configuration: str | None,
    window: Window | None,
) -> Corpus:
    """The cases of preprocessed data sets, or of one packed folder.

    Args:
        datasets: names or ids; None with ``packed``.
        packed: folder, or its name in ``nnUNet_preprocessed``.
        plans, configuration, window: of the data sets; None: the defaults of ``open_b2nd``.

    Raises:
        ValueError: something is missing or damaged, or was settled when the data were packed; says what to do.
    """
    if packed is None:
        assert datasets is not None
        return open_b2nd(datasets, plans, configuration, window)
    settled = {"p": plans, "c": configuration, "window_hu": window}
    given = [f"-{flag}" for flag, value in settled.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} was settled when {packed} was packed; leave it out.")
    return PackedCorpus(packed_folder(packed))


def packed_folder(name: str | Path) -> Path:
    """A path that exists as given, else a name in ``nnUNet_preprocessed``."""
    path = Path(name)
    return path if path.is_dir() or path.is_absolute() else preprocessed_root() / path
