"""Whether two CT scans show the same patient, from some hundred bytes of each.

A fingerprint describes the 48 most marked places of a scan (blobs of a few mm, brighter or darker than what is around
them) by 128 bits each: which of two spots within 2 cm is the brighter one, for 128 pairs of spots. Such a bit stays
what it is when a scan is cropped elsewhere, resampled, stored as another type, or rescaled; scans of one patient share
places, and others hardly any. The pairs are closed under the 48 ways to turn and mirror a box, so another axis order is
another order of the bits, and all 48 are compared.

No image can be had from it: where the places are is not kept, nor any value; only signs of differences.
Measured on real CT: docs/explanation/reliability.md. Detection as in Lowe 2004 (difference of Gaussians), bits as in
Calonder et al. 2010 (BRIEF), search as in Norouzi et al. 2012 (multi-index hashing).
"""

from __future__ import annotations

import base64
from itertools import permutations, product

import numpy as np
import scipy  # its ndimage is imported when it is first used: a quarter of a second, which most commands need not spend

WINDOW_HU = (-175.0, 250.0)
"""What every preprocessed volume keeps; values beyond are not looked at."""
GRID_MM, SMOOTH_MM = 3.0, 3.5
PLACES = 48
LATTICE_MM = 10.0
"""Spots lie on a 5 × 5 × 5 lattice of this width around a place."""
BITS = 128
MAX_DIFFERENT = 7
"""Bits in which the same place may differ. Fewer than there are 16-bit words: one word must agree, see ``Known``."""
ALIKE = 20
"""Bits in which two places of one scan must differ to count as two."""
SAME_PLACES, FEW_PLACES = 12, 10
"""Places that two scans must share to be of one patient: half of those of the scan that has fewer, within these."""
MUCH_LARGER = 4
"""Times the scans of a newer index that an older one has before both stay apart."""

Bits = np.ndarray
"""``(n, 8)`` uint16: 128 bits of each of up to 48 places."""

ONES = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)
"""In each 16-bit word."""
SPOTS = np.array(list(product(range(-2, 3), repeat=3)))
TURNS = [
    np.eye(3, dtype=int)[list(p)] * np.array(s) for p in permutations(range(3)) for s in product((1, -1), repeat=3)
]
"""The 48 signed axis permutations; the first leaves everything as it is."""


def spot_pairs() -> np.ndarray:
    """``(128, 2)`` indices into ``SPOTS``, closed under ``TURNS``: orbits of 48, 48, 24 and 8 pairs."""
    seeds = [((-1, -2, 2), (1, -2, 0)), ((-2, 1, -1), (-2, -1, 0)), ((0, -1, 2), (0, 1, 1)), ((2, -2, -2), (-1, 1, 1))]
    pairs: dict[frozenset[int], tuple[int, int]] = {}
    for pair in seeds:
        for turn in TURNS:
            a, b = (int((spot @ turn + 2) @ (25, 5, 1)) for spot in np.array(pair))
            pairs.setdefault(frozenset((a, b)), (a, b))
    assert len(pairs) == BITS
    return np.array(list(pairs.values()))[np.arange(BITS) * 37 % BITS]  # a word of 16 bits has some of each orbit


PAIRS = spot_pairs()


def turned_bits() -> tuple[np.ndarray, np.ndarray]:
    """``(48, 128)`` each: which bit of a scan is bit i of the same scan turned, and whether it is inverted."""
    place = {(int(a), int(b)): (i, False) for i, (a, b) in enumerate(PAIRS)}
    place |= {(int(b), int(a)): (i, True) for i, (a, b) in enumerate(PAIRS)}
    found = [[place[tuple((SPOTS[pair] @ turn + 2) @ (25, 5, 1))] for pair in PAIRS] for turn in TURNS]
    order, inverted = np.array(found).transpose(2, 0, 1)
    return order, inverted.astype(bool)


TURNED_ORDER, TURNED_INVERTED = turned_bits()


def fingerprint(hu: np.ndarray, spacing: tuple[float, ...]) -> Bits:
    """The fingerprint of a volume of HU with three axes and their spacing in mm; axes in any order and direction.

    It has fewer than 48 places where a scan is small or without structure; none, and it cannot be told from others.
    """
    volume = resample(hu, spacing)
    contrast = np.abs(smoothed(volume, 1.2) - smoothed(volume, 2.4))
    highest = scipy.ndimage.maximum_filter(contrast, size=5, mode="nearest")
    peak = (contrast == highest) & (contrast > 1)  # 1 HU: not a flat area
    for axis in range(3):
        np.moveaxis(peak, axis, 0)[[0, -1]] = False
    found = np.argwhere(peak)
    found = found[np.argsort(-contrast[tuple(found.T)], kind="stable")[: 2 * PLACES]]
    spots = refine(contrast, found)[:, None] + SPOTS * (LATTICE_MM / GRID_MM)
    at = spots.reshape(-1, 3).T
    values = scipy.ndimage.map_coordinates(smoothed(volume, 1.0), at, order=1, mode="nearest").reshape(-1, len(SPOTS))
    return distinct(packed(values[:, PAIRS[:, 0]] > values[:, PAIRS[:, 1]]))[:PLACES]


def smoothed(volume: np.ndarray, sigma: float | np.ndarray) -> np.ndarray:
    """By a Gaussian; ``sigma`` in voxels."""
    return scipy.ndimage.gaussian_filter(volume, sigma, mode="nearest")


def distinct(bits: Bits) -> Bits:
    """Without the places that look like one before them: all along a rod, they say nothing of who it is."""
    kept: list[int] = []
    for i, place in enumerate(bits):
        if not kept or different(bits[kept], place[None]).min() > ALIKE:
            kept.append(i)
    return bits[kept]


def resample(hu: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """The window of a volume on a grid of 3 mm, smoothed alike whatever the voxels were, float32."""
    blocks = [min(max(1, int(GRID_MM / mm)), n) for mm, n in zip(spacing, hu.shape, strict=True)]
    cut = hu[tuple(slice(0, n // b * b) for n, b in zip(hu.shape, blocks, strict=True))]
    volume = np.zeros([n // b for n, b in zip(cut.shape, blocks, strict=True)], np.float32)
    for offset in product(*map(range, blocks)):  # means of blocks, without a float copy of the whole
        part = cut[tuple(slice(o, None, b) for o, b in zip(offset, blocks, strict=True))]
        volume += np.clip(part, *WINDOW_HU)
    volume /= np.prod(blocks)
    mm = np.array(spacing) * blocks
    sigma = np.sqrt(np.maximum(SMOOTH_MM**2 - mm**2 / 12, 0.01)) / mm  # a block of width mm smooths already
    volume = smoothed(volume, sigma)
    for axis, width in enumerate(mm):
        last = volume.shape[axis] - 1
        at = np.arange(int(last * width / GRID_MM) + 1) * GRID_MM / width
        low = np.minimum(at.astype(int), last)
        share = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        high = np.minimum(low + 1, last)
        volume = volume.take(low, axis) * (1 - share) + volume.take(high, axis) * share
    return volume


def refine(contrast: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Maxima ``(n, 3)`` of a volume, between voxels: the top of a parabola along each axis."""
    places = found.astype(np.float32)
    for axis in range(3):
        step = np.eye(3, dtype=int)[axis]
        left, top, right = (contrast[tuple((found + k * step).T)] for k in (-1, 0, 1))
        bend = left - 2 * top + right
        places[:, axis] += np.where(bend < 0, (left - right) / np.where(bend < 0, 2 * bend, 1), 0).clip(-0.5, 0.5)
    return places


def packed(bits: np.ndarray) -> Bits:
    """``(…, 128)`` bool as ``(…, 8)`` uint16."""
    return np.ascontiguousarray(np.packbits(bits, axis=-1)).view(np.uint16)


def to_text(bits: Bits) -> str:
    """Base64, 1,024 characters for 48 places; ``-`` for none."""
    return base64.b64encode(bits.astype("<u2").tobytes()).decode() or "-"


def from_text(text: str) -> Bits:
    """Inverse of ``to_text``. ``ValueError`` for another text."""
    data = b"" if text == "-" else base64.b64decode(text, validate=True)
    if len(data) % (BITS // 8):
        raise ValueError(f"{len(data)} bytes are no fingerprint of {BITS // 8} bytes a place")
    return np.frombuffer(data, "<u2").reshape(-1, BITS // 16).astype(np.uint16)


def turned(bits: Bits) -> Bits:
    """``(48, n, 8)``: a fingerprint as each way to turn and mirror the scan would give it."""
    single = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=1).astype(bool)
    ways = single[:, TURNED_ORDER].transpose(1, 0, 2) ^ TURNED_INVERTED[:, None]
    return packed(ways)


def different(places: Bits, others: Bits) -> np.ndarray:
    """In how many bits places ``(n, 8)`` and others differ, ``(n,)``."""
    if hasattr(np, "bitwise_count"):  # since numpy 2: two long words instead of eight look-ups
        return np.bitwise_count(places.view(np.uint64) ^ others.view(np.uint64)).sum(1, dtype=np.uint8)
    return ONES[places ^ others].sum(1, dtype=np.uint8)


class Known:
    """Fingerprints by name, and the search for those of the same patient.

    Places that differ in at most 7 of 128 bits have one of 8 words in common, so only places that share a word with
    one that is looked for are compared (multi-index hashing). Scans may be added between searches: new ones are sorted
    into an index of their own, and indexes are put together when the next is not much larger, so that there are few.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._bits: list[Bits] = []
        self._indexes: list[Index] = []

    def add(self, name: str, bits: Bits) -> None:
        """A fingerprint of one more scan; one without places is never found."""
        self.names.append(name)
        self._bits.append(bits)

    def find(self, bits: Bits) -> list[str]:
        """Names of the scans of the same patient, the one that shares most places first."""
        if not len(bits):
            return []
        self._index()
        ways, shared = turned(bits), dict[int, int]()
        for index in self._indexes:
            shared |= index.count(ways)
        enough = [(n, i) for i, n in shared.items() if n >= needed(len(bits), len(self._bits[i]))]
        return [self.names[i] for _, i in sorted(enough, key=lambda pair: (-pair[0], pair[1]))]

    def _index(self) -> None:
        """Sort what is new, together with what is not much larger."""
        end, first = len(self.names), self._indexes[-1].end if self._indexes else 0
        if first == end:
            return
        while self._indexes and self._indexes[-1].end - self._indexes[-1].first <= MUCH_LARGER * (end - first):
            first = self._indexes.pop().first
        self._indexes.append(Index(self._bits[first:], first))


class Index:
    """Every word of every place of some scans, sorted."""

    def __init__(self, scans: list[Bits], first: int) -> None:
        self.first, self.end = first, first + len(scans)
        self.all = np.concatenate(scans)
        self.owner = first + np.repeat(np.arange(len(scans)), [len(bits) for bits in scans])
        self.order = [np.argsort(words, kind="stable").astype(np.int32) for words in self.all.T]
        self.sorted = [words[order] for words, order in zip(self.all.T, self.order, strict=True)]

    def near(self, flat: Bits) -> np.ndarray:
        """``(2, pairs)``: a place that is looked for and a known place like it; some pairs more than once."""
        found = []
        for word, order, known in zip(flat.T, self.order, self.sorted, strict=True):  # a word at a time: less memory
            first, end = np.searchsorted(known, word, "left"), np.searchsorted(known, word, "right")
            count = end - first
            query = np.repeat(np.arange(len(flat)), count)
            within = np.arange(len(query)) - np.repeat(np.cumsum(count) - count, count)
            other = order[np.repeat(first, count) + within]
            alike = different(flat[query], self.all[other]) <= MAX_DIFFERENT
            found.append(np.stack([query[alike], other[alike]]))
        return np.concatenate(found, axis=1)

    def count(self, ways: Bits) -> dict[int, int]:
        """Places that a scan, turned ``(48, n, 8)``, and each owner share, in the way that shares most."""
        query, other = self.near(ways.reshape(-1, BITS // 16))
        scans = self.owner[other] * len(ways) + query // ways.shape[1]  # an owner, a way
        ours = np.unique(np.stack([scans, query]), axis=1)[0]  # a place counts once, theirs too: who looks for whom
        theirs = np.unique(np.stack([scans, other]), axis=1)[0]  # makes no difference
        best: dict[int, int] = {}
        pairs, counts = np.unique(ours, return_counts=True)
        counts = np.minimum(counts, np.unique(theirs, return_counts=True)[1])
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            best[pair // len(ways)] = max(best.get(pair // len(ways), 0), count)
        return best


def needed(places: int, others: int) -> int:
    """Places that two scans with so many must share to be of one patient."""
    return min(max(FEW_PLACES, -(-min(places, others) // 2)), SAME_PLACES)
