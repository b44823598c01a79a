"""One text, and what holds for the texts of every kind of source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from mpt.errors import DataError

LIMIT_DOCUMENT_BYTES = 1 << 28
"""A larger document is refused: it is held in memory several times over."""

MARK = "\ufeff"
"""What may begin a text file, and is no part of the text."""

Skip = Callable[[str, str], None]
"""Called with a name and why nothing was taken from it."""


@dataclass(frozen=True)
class Document:
    """One text before tokenizing."""

    name: str
    """Where it comes from, for messages: a file, or a file and a line or row, counted from 1."""
    text: str
    """Not empty, and valid Unicode."""


class Meter:
    """How much of the files of a source has been read, in bytes on the disk."""

    def __init__(self) -> None:
        self._before = 0
        self._position: Callable[[], int] = int

    @property
    def read_bytes(self) -> int:
        return self._before + self._position()

    def reset(self) -> None:
        """Begin again at the first file."""
        self._before, self._position = 0, int

    @contextmanager
    def rows(self, size: int, n_rows: int) -> Iterator[Callable[[int], None]]:
        """Count a file of so many bytes, by the rows that the block says are done."""
        done = 0

        def seen(rows: int) -> None:
            nonlocal done
            done = rows

        with self.reading(lambda: size * done // max(1, n_rows)):
            yield seen

    @contextmanager
    def reading(self, position: Callable[[], int]) -> Iterator[None]:
        """Count a file until the end of the block, as far as `position` says it is read."""
        self._position = position
        try:
            yield
        finally:
            self._before, self._position = self.read_bytes, int


def decode(payload: bytes | bytearray, name: str, before: int = 0) -> str:
    """Return the text of UTF-8 bytes, `before` of the file before them.

    Raises:
        DataError: names the document, and the first byte that is not UTF-8.
    """
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {before + error.start} is 0x{payload[error.start]:02x}, which is not "
            "UTF-8; convert it to UTF-8, or leave it out."
        ) from error


def check_unicode(text: str, name: str) -> str:
    """Return a text that came out of JSON, which may hold half of a character; DataError if so."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: half a surrogate pair at character {error.start} is no text."
        ) from error
    return text


def read_whole(stream: BinaryIO, name: str) -> bytes:
    """Return all bytes of a document; DataError if there are too many."""
    payload = stream.read(LIMIT_DOCUMENT_BYTES + 1)
    refuse_if_too_large(len(payload), name)
    return payload


def refuse_if_too_large(size: int, name: str) -> None:
    """Raise DataError, which names the document, if it has more bytes than one may."""
    if size > LIMIT_DOCUMENT_BYTES:
        raise DataError(
            f"{name}: one document of more than {LIMIT_DOCUMENT_BYTES} bytes; cut it into several. "
            "A text file that is the source by itself is cut at blank lines."
        )
