"""A batch of documents to the tokens of each side of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.data.batches import Split, split_of
from mpt.data.words import WordEncoder, cuts_at_spaces
from mpt.tokenizer import Tokenizer

UINT16_IDS = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """What one batch adds to one dataset."""

    documents: int
    text_bytes: int
    tokens: NDArray[Any]
    """Of all its documents, each with its end-of-document token; of `id_dtype`."""


def id_dtype(vocab_size: int) -> str:
    """Return numpy's name of the smaller unsigned type that holds every id."""
    return "uint16" if vocab_size <= UINT16_IDS else "uint32"


class Encoder:
    """Tokenizes on one core."""

    def __init__(self, tokenizer: Tokenizer, eval_fraction: float) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(id_dtype(tokenizer.vocab_size))
        self._eval_fraction = eval_fraction
        self._words = WordEncoder(tokenizer, self.dtype) if cuts_at_spaces(tokenizer) else None

    def encode(self, texts: Sequence[bytes], wanted: Sequence[Split]) -> dict[Split, Encoded]:
        """Return what the texts add to each of the wanted datasets."""
        mine: dict[Split, list[bytes]] = {split: [] for split in wanted}
        for text in texts:
            split = split_of(text, self._eval_fraction)
            if split in mine:
                mine[split].append(text)
        return {
            split: Encoded(len(chosen), sum(map(len, chosen)), self._tokens(chosen))
            for split, chosen in mine.items()
        }

    def _tokens(self, texts: Sequence[bytes]) -> NDArray[Any]:
        decoded = [text.decode("utf-8") for text in texts]
        if self._words is not None:
            return self._words.encode(decoded)
        end = np.array([self.tokenizer.eod_id], self.dtype)
        parts = [np.empty(0, self.dtype)]
        for ids in self.tokenizer.encode_batch(decoded, n_threads=1):
            parts += (np.array(ids, self.dtype), end)
        return np.concatenate(parts)
