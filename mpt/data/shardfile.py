"""A shard file as it lies, whatever its samples hold: open, its table and header checked.

Read, not mapped: a file that is cut short while it is mapped kills the process with SIGBUS, a
disk that fails does too, and the pages of a map count as memory of the process. Reading a sample
of 4 KiB costs some 3.5 us of a CPU where a map costs 1.8.
"""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpt.errors import DataError

HEADER_LIMIT_BYTES = 1 << 16
OFFSETS_AT_ONCE = 1 << 20


class ShardFile:
    """An open shard; closed when the last reference goes."""

    def __init__(
        self,
        path: Path | str,
        file_bytes: int,
        samples: int,
        header: Mapping[str, Any],
        copy: BinaryIO | None = None,
        *,
        sample_bytes: int | None = None,
    ) -> None:
        """Open a file.

        Args:
            path: what to open, and what messages call it.
            file_bytes, samples: what the index says that it has.
            header: what its own header must say, by key.
            copy: read this open file instead. Its lock is held as long as the shard is open.
            sample_bytes: of every sample, or null if they may vary.

        Raises:
            DataError: missing, or not a shard, or not the one that is described.
        """
        self._path, self._size, self._samples = path, file_bytes, samples
        self._file = _open(path, copy)
        weakref.finalize(self, os.close, self._file)
        self._table_end = 4 + 4 * (samples + 1)
        self._check_size()
        self.begin = self._check_offsets(sample_bytes)
        """Where samples begin."""
        self._check_header(header)

    def __len__(self) -> int:
        return self._samples

    def extent(self, row: int) -> tuple[int, int]:
        """Return where the bytes of a sample begin and end."""
        assert 0 <= row < self._samples
        # The table is read again, and not kept: it may have changed since it was checked.
        start, end = self._words(1 + row, 2).tolist()
        if not self.begin <= start <= end <= self._size:
            raise self.bad("its offsets do not lead through the file")
        return start, end

    def raw(self, row: int) -> bytes:
        """Return the bytes of one sample."""
        start, end = self.extent(row)
        return self.read(start, end - start)

    def read(self, start: int, size: int) -> bytes:
        """Return a piece of the file."""
        buffer = bytearray(size)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill the buffer from the file, or say why that cannot be."""
        with self._named():
            self._read_on(start, out, 0)

    def read_pieces(self, starts: list[int], out: memoryview, places: list[int], size: int) -> None:
        """Fill pieces of the buffer, each from its place on with as many bytes of the file."""
        with self._named():
            for start, place in zip(starts, places, strict=True):
                piece = out[place : place + size]
                if (done := os.preadv(self._file, (piece,), start)) != size:
                    self._read_on(start, piece, done)

    def bad(self, what: str) -> DataError:
        """Return the error for a shard that is not what it should be."""
        return DataError(f"{self._path}: corrupt shard: {what}.")

    def _check_size(self) -> None:
        """Refuse what is not a regular file of the size that the index states."""
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{self._path}: not a regular file.")
        if status.st_size != self._size or self._size < 8:
            raise self.bad(f"it has {status.st_size} bytes; the index says {self._size}")
        if self._size < self._table_end:
            raise self.bad(f"{self._size} bytes cannot hold the offsets of {self._samples} samples")

    def _check_offsets(self, sample_bytes: int | None) -> int:
        """Return where samples begin; every offset is looked at, and none is kept."""
        n_samples, begin = map(int, self._words(0, 2))
        if n_samples != self._samples:
            raise self.bad(f"holds {n_samples} samples; the index says {self._samples}")
        before: int = begin
        for first in range(2, self._samples + 2, OFFSETS_AT_ONCE):
            offsets = self._words(first, min(OFFSETS_AT_ONCE, self._samples + 2 - first))
            sizes = np.diff(offsets.astype(np.int64), prepend=before)
            if (sizes < 0).any():
                raise self.bad("its offsets do not lead through the file")
            if sample_bytes is not None and (sizes != sample_bytes).any():
                raise self.bad(f"not all of its samples have {sample_bytes} bytes")
            before = int(offsets[-1])
        if begin < self._table_end or before != self._size:
            raise self.bad("its offsets do not lead through the file")
        return begin

    def _check_header(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a file whose own header disagrees with the index on how samples lie."""
        size = self.begin - self._table_end
        if size > HEADER_LIMIT_BYTES:
            raise self.bad(f"its header takes {size} bytes")
        try:
            header = json.loads(self.read(self._table_end, size).decode("utf-8"))
        except (ValueError, RecursionError) as cause:
            raise self.bad("its header is not JSON") from cause
        for key, value in wanted.items():
            seen = header.get(key) if isinstance(header, dict) else None
            if seen != value:
                raise self.bad(f"its header says {key} {seen!r:.80}; expected {value}")

    def _words(self, first: int, count: int) -> NDArray[np.uint32]:
        """Return numbers of the table at the beginning of the file."""
        return np.frombuffer(self.read(4 * first, 4 * count), "<u4")

    def _read_on(self, start: int, out: memoryview, done: int) -> None:
        """Fill the buffer, which has its first `done` bytes."""
        while done < len(out):
            count = os.preadv(self._file, (out[done:],), start + done)
            if not count:
                raise self.bad("it has become shorter since it was opened")
            done += count

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise _unreadable(self._path, cause) from cause


def _open(path: Path | str, copy: BinaryIO | None) -> int:
    """Return a descriptor of our own; opening a pipe does not wait for who writes to it."""
    try:
        if copy is None:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with copy:
            return os.dup(copy.fileno())
    except OSError as cause:
        raise _unreadable(path, cause) from cause


def _unreadable(path: Path | str, cause: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {cause.strerror or cause}.")
