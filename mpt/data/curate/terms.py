"""Texts as hashes of their words and of sequences of words, the same on every machine.

A term is a word without case, punctuation or compatibility forms, so that what differs in these
alone is taken for the same. Chinese characters and kana, which no space parts, are a term each;
other scripts without spaces (Thai, Khmer) have terms as long as their sentences.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

SLICE_CHARACTERS = 1 << 20
"""A longer text is cut, so that its words need not all be in memory at a time."""
LONGEST_TERM = 256
"""Where a slice ends in a longer one, it ends within it."""
NORMALISED_CHARACTERS = 64
"""Longer terms keep their form: normalising takes quadratic time for hostile ones."""
REMEMBERED = 1 << 19
"""Terms; when there are more, all are forgotten: some 80 MB."""

_PUNCTUATION = (
    r"\x00-\x1f!-/:-@\[-\^`{-\x7f\u00a1\u00ab\u00b7\u00bb\u00bf\u2010-\u2027\u2030-\u205e"
    r"\u3001-\u3003\u3008-\u3011\u3014-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
TERM = re.compile(rf"[{_ALONE}]|[^\s{_PUNCTUATION}{_ALONE}]+")
_GAP = re.compile(rf"[\s{_PUNCTUATION}]")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64, as are the next two
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hash_of(word: str) -> int:
    """Return 64 bits of BLAKE2b of a word: not what Python's own hash gives, which has a salt."""
    raw = word.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def mix(values: Hashes) -> Hashes:
    """Return the values with every bit spread over all: the finalizer of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Terms:
    """The terms of several texts, one after the other."""

    hashes: Hashes
    starts: NDArray[np.int64]
    """(texts + 1,): where the terms of each text begin; the last is where all end."""

    def grams(self, length: int) -> tuple[Hashes, NDArray[np.int64]]:
        """Return a hash of each sequence of so many terms, and where those of each text begin.

        A text with fewer terms has one sequence of them all; one without a term has none.
        """
        starts, ends = self.starts[:-1], self.starts[1:]
        counts = np.where(ends > starts, np.maximum(ends - starts - length + 1, 1), 0)
        begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        total = int(begins[-1])
        shift = np.repeat(starts - begins[:-1], counts)
        at = np.arange(total) + shift
        # Of a short text the missing terms are 0, as no hash of a term is but by chance.
        most = int((ends - starts).max(initial=0))
        short = most and bool(((ends - starts) < length).any())
        last = np.repeat(ends, counts) if short else None
        padded = np.concatenate([self.hashes, np.zeros(length, np.uint64)])
        values = np.zeros(total, np.uint64)
        for step in range(length):
            taken = padded[at + step]
            if last is not None:
                taken = np.where(at + step < last, taken, np.uint64(0))
            values = values * _MULTIPLIER + taken
        return mix(values), begins


class Reader:
    """Splits texts into terms, with a memory of those seen."""

    def __init__(self) -> None:
        self._memory = _Memory()

    def read(self, texts: Sequence[str]) -> Terms:
        """Return the terms of all texts."""
        parts: list[Hashes] = []
        counts = [0]
        for text in texts:
            before = counts[-1]
            for part in self.slices(text):
                parts.append(part)
                before += len(part)
            counts.append(before)
        hashes = np.concatenate(parts) if parts else np.empty(0, np.uint64)
        return Terms(hashes, np.array(counts, np.int64))

    def slices(self, text: str) -> Iterator[Hashes]:
        """Yield the terms of a text, a slice at a time."""
        start = 0
        while start < len(text):
            end = start + SLICE_CHARACTERS
            if end < len(text):
                gap = _GAP.search(text, end, end + LONGEST_TERM)
                end = gap.start() if gap else end + LONGEST_TERM
            yield self._hashes(TERM.findall(text, start, end))
            start = end

    def _hashes(self, terms: list[str]) -> Hashes:
        memory = self._memory
        packed = array("Q", map(memory.__getitem__, terms))
        if len(memory) > REMEMBERED:
            memory.clear()
        return np.frombuffer(packed, np.uint64)


class _Memory(dict[str, int]):
    """From a word as it is written to the hash of its term."""

    def __missing__(self, word: str) -> int:
        term = word.casefold()
        if len(term) <= NORMALISED_CHARACTERS and not term.isascii():
            term = unicodedata.normalize("NFKC", term).casefold()
        value = hash_of(term)
        if len(word) <= NORMALISED_CHARACTERS:
            self[word] = value
        return value
