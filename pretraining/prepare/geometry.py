"""What a volume's axes must be: at right angles, of positive spacing, and the same in every field that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_TILT_DEGREES = 0.5
"""What angles may be off: headers hold rounded numbers."""
SPACING_TOLERANCE = 0.005
"""Relative: 0.703125 mm may be written as 0.70."""
STRAIGHTEN = "resample it to straight axes first; dcm2niix does so for a tilted gantry"


class Refused(Exception):
    """A source that is no usable CT volume; the text is the reason."""


def check_spacing(spacing: Sequence[float], what: str = "spacing") -> None:
    """``Refused`` for what no scanner writes."""
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise Refused(f"{what} {millimetres(spacing)} mm is not positive; write the true one into the header")


def check_axes(axes: np.ndarray, what: str) -> None:
    """``Refused`` unless the columns of ``axes`` ``(3, 3)`` are at right angles; their lengths may be any but 0.

    ``what`` names the header field.
    """
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(axes).all() or not lengths.all():
        raise Refused(f"{what} has an axis that is zero or not finite; write the true axes into the header")
    cosines = np.abs((axes / lengths).T @ (axes / lengths) - np.eye(3))
    angle = math.degrees(math.acos(min(1.0, float(cosines.max()))))
    if 90 - angle > MAX_TILT_DEGREES:
        first, second = sorted(int(i) + 1 for i in np.unravel_index(cosines.argmax(), cosines.shape))
        raise Refused(
            f"sheared (gantry tilt): in {what} axes {first} and {second} meet at {angle:.1f}° instead of 90°; "
            f"{STRAIGHTEN}"
        )


def angle_between(first: np.ndarray, second: np.ndarray) -> float:
    """The largest angle in degrees between a column of ``first`` ``(3, 3)`` and the same column of ``second``."""
    a, b = (axes / np.linalg.norm(axes, axis=0) for axes in (first, second))
    return math.degrees(math.acos(float(np.clip((a * b).sum(axis=0).min(), -1, 1))))


def same_spacing(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two spacings differ by rounding only."""
    return np.allclose(first, second, rtol=SPACING_TOLERANCE, atol=0)


def millimetres(values: Sequence[float]) -> str:
    """1.5 × 1.5 × 3"""
    return " × ".join(f"{float(value):.4g}" for value in values)
