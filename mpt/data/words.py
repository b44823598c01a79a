"""Text to ids by way of words that were seen before: what the tokenizer gives, in less time.

A tokenizer merges neighbours only into pieces that it has. Where no piece of it holds a space after
another character, nothing merges across such a place, and a text may be cut there: the ids of the
words, one after the other, are those of the text. Most words of a text have occurred before it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mpt.errors import DataError
from mpt.tokenizer import SPACE_MARK, SentencePieceTokenizer, Tokenizer

WORD = re.compile(" *[^ ]+| +")
CUT = re.compile("(?<=[^ ]) ")
SLICE_CHARACTERS = 1 << 20
"""A longer text is cut, so that its words need not all be in memory at a time."""
UNITS_AT_A_TIME = 1 << 16
REMEMBERED_WORDS = 1 << 19
"""When there are more, all are forgotten: some 100 MB."""
REMEMBERED_CHARACTERS = 32
"""Longer words are not remembered; without spaces, a word is a paragraph."""
LIMIT_WORD_CHARACTERS = 1 << 24
"""A longer one is refused: sentencepiece takes 45 bytes of memory for each of its characters."""
END = ""
"""Stands for the end of a document among words; no word is empty."""


def cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Say whether a text may be cut before the spaces that follow another character."""
    return isinstance(tokenizer, SentencePieceTokenizer) and not any(
        re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", piece.text)
        for piece in tokenizer.pieces
        if piece.kind != "byte"
    )


class WordEncoder:
    """Tokenizes documents with a memory of words; for tokenizers that cut at spaces."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._end = self._packed([tokenizer.eod_id])
        self._memory: dict[str, bytes] = {END: self._end}

    def encode(self, texts: Sequence[str]) -> NDArray[np.unsignedinteger]:
        """Return the ids of all texts, each with the end of a document after it.

        Raises:
            DataError: a word that would take too much memory.
        """
        parts: list[bytes] = []
        units: list[str] = []
        for text in texts:
            for part in _slices(text):
                units += WORD.findall(part)
                if len(units) >= UNITS_AT_A_TIME:
                    parts.append(self._look_up(units))
                    units = []
            units.append(END)
        parts.append(self._look_up(units))
        return np.frombuffer(b"".join(parts), self._dtype)

    def _look_up(self, units: list[str]) -> bytes:
        memory = self._memory
        new = [word for word in set(units) if word not in memory]
        if (longest := max(map(len, new), default=0)) > LIMIT_WORD_CHARACTERS:
            raise DataError(
                f"{longest} characters without a space, of {LIMIT_WORD_CHARACTERS} at most; drop "
                "the document, or cut it into several."
            )
        for word, ids in zip(new, self._tokenizer.encode_batch(new, n_threads=1), strict=True):
            memory[word] = self._packed(ids)
        found = b"".join(map(memory.__getitem__, units))
        if len(memory) > REMEMBERED_WORDS:
            self._memory = {END: self._end}
            return found
        for word in new:
            if len(word) > REMEMBERED_CHARACTERS:
                del memory[word]
        return found

    def _packed(self, ids: list[int]) -> bytes:
        return array("H" if self._dtype.itemsize == 2 else "I", ids).tobytes()


def _slices(text: str) -> Iterator[str]:
    """Cut a long text at places where nothing merges."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + SLICE_CHARACTERS)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
