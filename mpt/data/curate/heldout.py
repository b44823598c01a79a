"""What a model is tested on, as hashes of its sequences of words, and texts that share one."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt.data.curate.duplicates import check_size
from mpt.data.curate.terms import SLICE_CHARACTERS, Hashes, Reader, Terms

BYTES_A_GRAM = 16
"""While the table is made; 8 when it is there."""


class HeldOut:
    """A sorted table of hashes in a file without a name, so that workers share its memory."""

    def __init__(self, descriptor: int, count: int, ngram_words: int) -> None:
        """Map a table that `hold` made, here or in another process."""
        self.descriptor = descriptor
        self.count = count
        self.ngram_words = ngram_words
        size = count * 8
        self._grams: Hashes = np.empty(0, np.uint64)
        if size:
            self._grams = np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint64)

    def digest(self) -> str:
        """Return the SHA-256 of the table."""
        return hashlib.sha256(self._grams.tobytes()).hexdigest()

    def close(self) -> None:
        os.close(self.descriptor)

    def shared_by(self, texts: Sequence[str], heads: Terms, reader: Reader) -> NDArray[np.bool_]:
        """Return which texts have a sequence of the table.

        Args:
            texts: all of them.
            heads: the terms of their first slices; longer ones are read to their end.
        """
        grams, starts = heads.grams(self.ngram_words)
        hits = np.concatenate([[0], np.cumsum(self._has(grams))])
        found: NDArray[np.bool_] = hits[starts[1:]] > hits[starts[:-1]]
        for number, text in enumerate(texts):
            if not found[number] and len(text) > SLICE_CHARACTERS:
                found[number] = any(
                    self._has(part).any() for part in _grams_of(text, reader, self.ngram_words)
                )
        return found

    def _has(self, grams: Hashes) -> NDArray[np.bool_]:
        if not self.count or not len(grams):
            return np.zeros(len(grams), bool)
        at = np.searchsorted(self._grams, grams)
        result: NDArray[np.bool_] = self._grams[np.minimum(at, self.count - 1)] == grams
        return result


def hold(texts: Iterator[str], ngram_words: int, limit_bytes: int, folder: Path) -> HeldOut:
    """Return the table of all sequences of so many words in the texts.

    A text with fewer words is held as a whole: it is found where it is all of a document.

    Args:
        folder: where there is room on the disk; nothing is left there, not even after a kill.

    Raises:
        DataError: the table would take more memory than it may.
    """
    reader = Reader()
    parts: list[Hashes] = []
    total, settled = 0, 0
    for text in texts:
        for part in _grams_of(text, reader, ngram_words):
            parts.append(part)
            total += len(part)
        if total > 2 * settled + (1 << 20):  # repeated sequences take no room for long
            parts = [np.unique(np.concatenate(parts))]
            total = settled = len(parts[0])
        check_size(total * BYTES_A_GRAM, limit_bytes, "test texts to decontaminate against")
    grams = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(grams.tobytes())
        file.flush()
        return HeldOut(os.dup(file.fileno()), len(grams), ngram_words)


def _grams_of(text: str, reader: Reader, length: int) -> Iterator[Hashes]:
    """Yield the hashes of the sequences of a text of any length, those across slices too."""
    rest = np.empty(0, np.uint64)
    first = True
    for part in reader.slices(text):
        terms = np.concatenate([rest, part])
        if first or len(terms) >= length:
            grams, _ = Terms(terms, np.array([0, len(terms)])).grams(length)
            yield grams
        first = False
        rest = terms[max(0, len(terms) - length + 1) :]
