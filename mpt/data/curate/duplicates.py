"""Which documents have been seen before: tables that grow up to a stated size, and no further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mpt.data.curate.sketch import N_HASHES, agreeing_bytes
from mpt.errors import DataError

FIRST_SLOTS = 1 << 10
FULL = 0.75
"""Share of the slots that may be taken before the table grows."""
GROWTH = 1.5
TAIL = 1 << 8
"""Slots behind the last home: a search never wraps."""
MOST_ALIKE = 16
"""Documents held under one key of a band: where there are more, as of a licence that stands in
all of them, the first ones stand for the rest, so that no search is long."""
SLOT_BITS = np.uint64(32)


class Table:
    """From 64-bit keys to document numbers: open addressing with linear probing.

    12 bytes a slot, and 8 where no numbers are kept; half to three quarters of the slots are taken.
    """

    def __init__(self, limit_bytes: int, what: str, *, numbered: bool) -> None:
        self.limit_bytes = limit_bytes
        self._what = what
        self._numbered = numbered
        self._taken = 0
        self._lay(FIRST_SLOTS, TAIL)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._numbers.nbytes

    def find(self, key: int) -> Iterator[int]:
        """Yield the numbers kept under a key, 0 for each where none are kept."""
        keys, at = self._view, ((key >> 32) * self._slots) >> 32
        while held := keys[at]:
            if held == key:
                yield self._numbers_view[at] if self._numbered else 0
            at += 1

    def add(self, key: int, number: int = 0) -> None:
        """Keep a number under a key, besides those already there.

        Raises:
            DataError: the table would be larger than it may.
        """
        if self._taken >= FULL * self._slots:
            self._grow(int(self._slots * GROWTH))
        keys, at, alike = self._view, ((key >> 32) * self._slots) >> 32, 0
        while held := keys[at]:
            alike += held == key
            at += 1
        if alike >= MOST_ALIKE:
            return
        if at == len(keys) - 1:  # the last stays free, so that every search ends
            self._grow(self._slots, tail=2 * (len(keys) - self._slots))
            self.add(key, number)
            return
        keys[at] = key
        if self._numbered:
            self._numbers_view[at] = number
        self._taken += 1

    def _lay(self, slots: int, tail: int) -> None:
        self._slots = slots
        self._keys = np.zeros(slots + tail, np.uint64)
        self._numbers = np.zeros(slots + tail if self._numbered else 0, np.uint32)
        self._view, self._numbers_view = self._keys.data, self._numbers.data

    def _grow(self, slots: int, tail: int = TAIL) -> None:
        """Lay the table out anew; keys that are the same stay in their order."""
        old_keys, old_numbers = self._keys, self._numbers
        check_size((slots + tail) * (12 if self._numbered else 8), self.limit_bytes, self._what)
        taken = np.flatnonzero(old_keys)
        homes = ((old_keys[taken] >> SLOT_BITS) * np.uint64(slots)) >> SLOT_BITS
        order = np.argsort(homes, kind="stable")
        nth = np.arange(len(order))
        # Each lies at its home, or behind the one before it.
        at = np.maximum.accumulate(homes[order].astype(np.int64) - nth) + nth
        self._lay(slots, max(tail, int(at[-1]) + 2 - slots))
        self._keys[at] = old_keys[taken][order]
        if self._numbered:
            self._numbers[at] = old_numbers[taken][order]


class ExactTable:
    """Documents by a hash of their text: 11 to 16 bytes each, and 27 while the table grows."""

    def __init__(self, limit_bytes: int) -> None:
        self._table = Table(limit_bytes, "exact duplicates", numbered=False)

    def has(self, key: int) -> bool:
        return any(True for _ in self._table.find(key or 1))

    def add(self, key: int) -> None:
        self._table.add(key or 1)


class NearTable:
    """Documents by bands of their sketches: 128 to 192 bytes each, and 16 to 24 a band.

    That is 272 to 408 at a threshold of 0.8, with its 9 bands.
    """

    def __init__(self, threshold: float, limit_bytes: int) -> None:
        self._least = agreeing_bytes(threshold)
        self._table = Table(limit_bytes, "near duplicates", numbered=True)
        self._limit_bytes = limit_bytes
        self._sketches = np.zeros((FIRST_SLOTS, N_HASHES), np.uint8)
        self._n = 0

    def has(self, bands: Sequence[int], sketch: NDArray[np.uint8]) -> bool:
        """Say whether a document is there whose sketch is as alike as the threshold."""
        find = self._table.find
        met = {number for band in bands for number in find(band or 1)}
        return any(
            int(np.count_nonzero(self._sketches[number] == sketch)) >= self._least
            for number in sorted(met)
        )

    def add(self, bands: Sequence[int], sketch: NDArray[np.uint8]) -> None:
        if self._n == len(self._sketches):
            more = int(self._n * GROWTH)
            size = more * N_HASHES + self._table.nbytes
            check_size(size, self._limit_bytes, "near duplicates")
            grown = np.zeros((more, N_HASHES), np.uint8)
            grown[: self._n] = self._sketches
            self._sketches = grown
            self._table.limit_bytes = self._limit_bytes - grown.nbytes
        self._sketches[self._n] = sketch
        for band in bands:
            self._table.add(band or 1, self._n)
        self._n += 1


def check_size(wanted_bytes: int, limit_bytes: int, what: str) -> None:
    """Raise DataError rather than let a table outgrow what it may take of memory."""
    if wanted_bytes > limit_bytes:
        raise DataError(
            f"the table of {what} would take {wanted_bytes} bytes, and "
            f"prepare.curate.limit_bytes is {limit_bytes}; raise that if the memory is there, or "
            "prepare the source in parts."
        )
