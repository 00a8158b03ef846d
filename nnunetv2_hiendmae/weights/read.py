"""Any file of weights that there is a way to read: ours, the authors', nnssl's, nnU-Net's Primus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, Window
from nnunetv2_hiendmae.weights.file import FORMAT, check_content, load_tensors, load_weights, refuse_pretraining
from nnunetv2_hiendmae.weights.nnssl import HEADER, PLAN, from_nnssl
from nnunetv2_hiendmae.weights.official import Imported, import_official
from nnunetv2_hiendmae.weights.primus import import_primus, is_primus


def checked(imported: Imported) -> Imported:
    """What was read, if its header describes its tensors. Errors as ``check_content``."""
    check_content(imported.encoder, {"sha256": "", **imported.header})
    return imported


@contextmanager
def no_traceback(file: Path, words: str) -> Iterator[None]:
    """Anything that a plan or a header in a file holds in place of what it should, as one ``ValueError``."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file} is no sound {words}: {type(error).__name__}: {error}") from None


def read_weights(
    file: Path, num_heads: int | None = None, img_size: Size | None = None, window_hu: Window | None = None
) -> Imported:
    """The encoder in a file, and the decoder where it has one of the authors.

    ``num_heads``, ``img_size`` and ``window_hu`` are what foreign files do not record; see ``import_official`` and
    ``import_primus``.

    Raises:
        ValueError: a file of none of these forms, or damaged, or one that records what is given.
    """
    checkpoint = load_tensors(file)
    refuse_pretraining(checkpoint, file)
    known = isinstance(checkpoint, Mapping)
    if known and (checkpoint.get("format") == FORMAT or HEADER in checkpoint):
        facts = {"num_heads": num_heads, "img_size": img_size, "window_hu": window_hu}
        given = [f"-{name}" for name, value in facts.items() if value is not None]
        if given:
            raise ValueError(f"{file} has a header that says what {', '.join(given)} would; leave it out.")
        if HEADER in checkpoint:
            with no_traceback(file, "nnssl-style checkpoint"):
                return checked(from_nnssl(checkpoint))
        weights = load_weights(file)
        return Imported("a Hi-End-MAE weights file", weights.encoder, weights.header, [])
    if known and is_primus(checkpoint):
        with no_traceback(file, "Primus checkpoint"):
            return checked(import_primus(checkpoint, num_heads, img_size, window_hu or DEFAULT_WINDOW))
    if known and PLAN in checkpoint:
        with no_traceback(file, "nnssl checkpoint"):
            architecture = (checkpoint[PLAN].get("architecture_plans") or {}).get("arch_class_name")
        raise ValueError(
            f"This nnssl checkpoint holds the architecture '{architecture}', which is not a Hi-End-MAE ViT or a Primus "
            f"(its first version); its weights have no place here."
        )
    return import_official(checkpoint, num_heads, img_size, window_hu or DEFAULT_WINDOW)
