"""The probe of a run: the labelled data set that ``-probe`` names, at the run's spacing, window and crop size."""

from __future__ import annotations

from nnunetv2_hiendmae.probe.labelled import Labelled
from nnunetv2_hiendmae.probe.linear import Probe
from pretraining.config import RunConfig
from pretraining.data.b2nd import default_plans
from pretraining.data.corpus import Corpus
from pretraining.data.packed import PACKED


def labelled_cases(config: RunConfig, corpus: Corpus) -> Labelled | None:
    """What is to be probed; None without ``-probe``. ``ValueError`` if it does not fit the run."""
    if config.probe is None:
        return None
    packed = config.plans == PACKED
    plans = config.probe_plans or (default_plans([config.probe]) if packed else config.plans)
    configuration = "3d_fullres" if packed else config.configuration
    try:
        labelled = Labelled.open(config.probe, plans, configuration, config.window_hu)
        labelled.check([d.spacing for d in corpus.datasets], corpus.in_channels)
    except ValueError as error:
        raise ValueError(f"-probe {config.probe}: {error}") from None
    return labelled


def open_probe(config: RunConfig, corpus: Corpus) -> Probe | None:
    """With its crops in memory. ``ValueError`` as ``labelled_cases``, or for a damaged file."""
    labelled = labelled_cases(config, corpus)
    return Probe(labelled, config.model.img_size, config.model.patch_size) if labelled else None
