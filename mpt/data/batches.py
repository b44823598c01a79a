"""Documents in numbered batches: what is tokenized at a time, and where a restart goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mpt.data.source import Document, Meter

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")

BATCH_CHARACTERS = 1 << 20
"""A batch is full when it holds as much text."""
BATCH_DOCUMENTS = 1 << 14
"""Or as many documents: each takes memory of its own, however short it is."""


@dataclass(frozen=True)
class Batch:
    """Documents that are neighbours in the source, as UTF-8."""

    number: int
    """From 0, in the order of the source: a function of the source alone."""
    texts: list[bytes]
    names: list[str]
    """Where each document comes from."""
    read_bytes: int
    """How much of the source's files was read for this batch and those before it."""

    @property
    def first(self) -> str:
        return self.names[0]

    @property
    def last(self) -> str:
        return self.names[-1]

    @property
    def text_bytes(self) -> int:
        return sum(map(len, self.texts))


def batches(found: Iterable[Document], meter: Meter) -> Iterator[Batch]:
    """Yield the documents in batches; only one is held at a time."""
    texts: list[bytes] = []
    names: list[str] = []
    size, number = 0, 0
    for document in found:
        names.append(document.name)
        texts.append(document.text.encode("utf-8"))
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield Batch(number, texts, names, meter.read_bytes)
            texts, names, size, number = [], [], 0, number + 1
    if texts:
        yield Batch(number, texts, names, meter.read_bytes)


def split_of(text: bytes, eval_fraction: float) -> Split:
    """Return the part of the split that a text is in, by its content: the same text, the same."""
    draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return "eval" if draw < eval_fraction else "train"
