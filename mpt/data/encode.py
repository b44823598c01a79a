"""A batch of documents to the tokens of each side of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpt.data.batches import Split, split_of
from mpt.data.words import WordEncoder, cuts_at_spaces
from mpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpt.data.curate.tally import Tally

UINT16_IDS = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """What one batch adds to one dataset."""

    documents: int
    text_bytes: int
    tokens: NDArray[Any]
    """Of all its documents, each with its end-of-document token; of `id_dtype`."""
    tally: Tally | None = None
    """What curation did to them; null where there is none."""


def id_dtype(vocab_size: int) -> str:
    """Return numpy's name of the smaller unsigned type that holds every id."""
    return "uint16" if vocab_size <= UINT16_IDS else "uint32"


class Encoder:
    """Tokenizes on one core."""

    def __init__(self, tokenizer: Tokenizer, eval_fraction: float) -> None:
        self.tokenizer: Tokenizer = tokenizer
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
            split: Encoded(len(chosen), sum(map(len, chosen)), self.tokens(chosen))
            for split, chosen in mine.items()
        }

    def arguments(self) -> list[str]:
        """Return what a worker is told to make this encoder, its tokenizer aside."""
        return [repr(self._eval_fraction)]

    def descriptors(self) -> list[int]:
        """Return the open files that a worker must have too."""
        return []

    def pack(self, result: dict[Split, Encoded]) -> tuple[dict[str, Any], bytes]:
        """Return what a worker answers: by split [documents, text bytes, tokens], and the ids."""
        head: dict[str, Any] = {
            s: [e.documents, e.text_bytes, len(e.tokens)] for s, e in result.items()
        }
        return head, b"".join(encoded.tokens.tobytes() for encoded in result.values())

    def unpack(self, head: dict[Any, Any], payload: bytes, _n: int) -> dict[Split, Encoded]:
        """Return what `pack` packed."""
        ids = np.frombuffer(payload, self.dtype)
        result: dict[Split, Encoded] = {}
        for split, (documents, text_bytes, n_tokens) in head.items():
            result[split], ids = Encoded(documents, text_bytes, ids[:n_tokens]), ids[n_tokens:]
        return result

    def tokens(self, texts: Sequence[bytes]) -> NDArray[Any]:
        """Return the ids of texts, each with its end of document."""
        decoded = [text.decode("utf-8") for text in texts]
        if self._words is not None:
            return self._words.encode(decoded)
        end = np.array([self.tokenizer.eod_id], self.dtype)
        parts = [np.empty(0, self.dtype)]
        for ids in self.tokenizer.encode_batch(decoded, n_threads=1):
            parts += (np.array(ids, self.dtype), end)
        return np.concatenate(parts)
