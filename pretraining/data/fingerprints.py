"""Fingerprints of the cases that a run was trained on, for the header of its weights."""

from __future__ import annotations

from functools import partial

from nnunetv2_hiendmae.identity import fingerprint, to_text
from nnunetv2_hiendmae.intensity import Window
from pretraining.data.corpus import Corpus, canonical_volume
from pretraining.processes import process_pool, usable_cores

FEW = 32
"""Cases for which no processes are started."""


def fingerprints_of(corpus: Corpus, window: Window) -> dict[str, list[str]]:
    """By data set, in an order that does not tell the cases' names; made from the volumes themselves.

    So they are there whoever preprocessed the data, and packed or not. About 0.1 s a case.
    """
    one = partial(fingerprint_case, corpus, window)
    if len(corpus) <= FEW:
        texts = list(map(one, range(len(corpus))))
    else:
        with process_pool(usable_cores()) as pool:
            texts = list(pool.map(one, range(len(corpus)), chunksize=8))
    found: dict[str, list[str]] = {d.name: [] for d in corpus.datasets}
    for case, text in enumerate(texts):
        found[corpus.dataset(case).name].append(text)
    return {name: sorted(values) for name, values in found.items()}


def fingerprint_case(corpus: Corpus, window: Window, case: int) -> str:
    """Of the first channel."""
    stored = corpus.read(case, (0, 0, 0), corpus.shape(case))
    low, high = window
    hu = canonical_volume(stored, corpus.intensity(case))[0] * (high - low) + low
    return to_text(fingerprint(hu, corpus.dataset(case).spacing))
