"""A text file: a document by itself, or cut into several where it is the whole source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from mpt.data.source import document
from mpt.data.source.document import MARK, Document, decode, read_whole, refuse_if_too_large

PIECE_BYTES = 1 << 12
"""A text file named by itself is cut, at blank lines, into documents of at least so much."""


def whole(stream: BinaryIO, name: str) -> Iterator[Document]:
    """Yield the file as one document."""
    yield Document(name, decode(read_whole(stream, name), name).removeprefix(MARK))


def pieces(stream: BinaryIO, file: str) -> Iterator[Document]:
    """Cut a text at the blank lines that come after each PIECE_BYTES."""
    piece, size, start, number = bytearray(), 0, 1, 0
    while line := stream.readline(document.LIMIT_DOCUMENT_BYTES + 1):
        number += 1
        piece += line
        refuse_if_too_large(len(piece), f"{file}:{start}")
        if len(piece) >= PIECE_BYTES and not line.strip():
            yield Document(f"{file}:{start}", decode(piece, file, size).removeprefix(MARK))
            size += len(piece)
            piece, start = bytearray(), number + 1
    if piece:
        yield Document(f"{file}:{start}", decode(piece, file, size).removeprefix(MARK))
