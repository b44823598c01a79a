"""MinHash: of a set of shingles, a few bytes by which its likeness to another is told.

Ours and not a library's, since the bytes of a dataset hang on every bit of it: datasketch brings
scipy and hashes each shingle in Python, and rensa changed its digests from one version to the next.

Source: Broder 1997, On the resemblance and containment of documents; the bands are those of
Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt.data.curate.terms import Hashes, Terms, mix

N_HASHES = 128
MISSED = 0.01
"""Share of the pairs just at the threshold that no band may bring together."""
BAND_CHANCE = 0.4
"""About how likely one band shall bring such a pair together: then few bands are needed, and few
pairs meet for nothing."""
MOST_ROWS = 12
CHANCE_BYTES = 1 / 256
"""How often the sketches of two unlike sets agree in a byte."""

_SEEDS = mix(np.arange(1, 2 * N_HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
_FACTORS, _SHIFTS = _SEEDS[:N_HASHES] | np.uint64(1), _SEEDS[N_HASHES:]


@dataclass(frozen=True)
class Sketches:
    """Of several texts; those without a single term have `found` false and zeros elsewhere."""

    found: NDArray[np.bool_]  # (texts,)
    bands: Hashes  # (texts, bands): texts that agree in one of them are to be compared
    bytes: NDArray[np.uint8]  # (texts, N_HASHES): a byte of each of the smallest hashes


def band_shape(threshold: float) -> tuple[int, int]:
    """Return how many bands of how many rows bring a pair at the threshold together.

    With b bands of r rows a pair of similarity s meets with probability 1 - (1 - s^r)^b.
    """
    if threshold >= 1.0:
        return 1, MOST_ROWS
    rows = round(math.log(BAND_CHANCE) / math.log(threshold))
    rows = min(max(rows, 2), MOST_ROWS)
    bands = math.ceil(math.log(MISSED) / math.log1p(-(threshold**rows)))
    return min(bands, N_HASHES // rows), rows


def sketch(terms: Terms, shingle_words: int, threshold: float) -> Sketches:
    """Return the sketches of texts, each from the set of its shingles."""
    shingles, starts = terms.grams(shingle_words)
    found = starts[1:] > starts[:-1]
    n_bands, rows = band_shape(threshold)
    bands = np.zeros((len(found), n_bands), np.uint64)
    kept = np.zeros((len(found), N_HASHES), np.uint8)
    if len(shingles):
        smallest = np.empty((N_HASHES, int(found.sum())), np.uint64)
        for number in range(N_HASHES):
            hashes = shingles * _FACTORS[number] + _SHIFTS[number]
            np.minimum.reduceat(hashes, starts[:-1][found], out=smallest[number])
        kept[found] = (mix(smallest) & np.uint64(0xFF)).astype(np.uint8).T
        for band in range(n_bands):
            value = np.full(smallest.shape[1], band + 1, np.uint64)
            for row in smallest[band * rows : (band + 1) * rows]:
                value = mix(value + row)
            bands[found, band] = value
    return Sketches(found, bands, kept)


def agreeing_bytes(threshold: float) -> int:
    """Return in how many bytes two sketches must agree to be as alike as the threshold."""
    share = threshold + (1 - threshold) * CHANCE_BYTES
    return math.ceil(share * N_HASHES - 1e-9)
