"""One shard open for reading: checked before use, and read a sample at a time.

Read, not mapped: a file that is cut short while it is mapped kills the process with SIGBUS, a
disk that fails does too, and the pages of a map count as memory of the process. A read of one
sample takes no longer than the page faults it saves.
"""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpt.data.shard import DTYPE_OF_CODE, ShardInfo, shard_config
from mpt.errors import DataError

Integers = NDArray[np.int64]

HEADER_LIMIT_BYTES = 1 << 16
OFFSETS_AT_ONCE = 1 << 20
HEAD_BYTES = 14
"""The most before a sample's values: its size, a type, a shape of one number of 8 bytes."""


@dataclass(frozen=True)
class Values:
    """Where the tokens of a sample lie."""

    dtype: np.dtype[Any]
    start: int
    """Of the file."""
    count: int

    @property
    def n_bytes(self) -> int:
        return self.count * self.dtype.itemsize


class Shard:
    """A shard file that is open; closed when the last reference goes."""

    def __init__(self, path: Path | str, info: ShardInfo, copy: BinaryIO | None = None) -> None:
        """Open a file.

        Args:
            path: what to open, and what messages call it.
            copy: read this open file instead. Its lock is held as long as the shard is open.

        Raises:
            DataError: missing, or not a shard, or not the one that `info` describes.
        """
        self._path = path
        self._encoding = info.encoding
        self._samples, self._size = info.samples, info.file_bytes
        self._file = _open(path, copy)
        weakref.finalize(self, os.close, self._file)
        self._table_end = 4 + 4 * (info.samples + 1)
        self._check_size()
        self._begin = self._check_offsets()
        self._check_header()

    def __len__(self) -> int:
        return self._samples

    def sample(self, row: int) -> NDArray[Any]:
        """Return one sample's tokens.

        Raises:
            DataError: the sample is corrupt; names file and row.
        """
        place = self._find(row)
        tokens = np.empty(place.count, place.dtype)
        if place.count:
            self._read_into(place.start, tokens.view(np.uint8).data)
        return tokens.astype(self._encoding.file_dtype, copy=False)

    def read(self, rows: Integers, out: NDArray[Any], places: Integers) -> None:
        """Read samples into some rows of an array.

        Args:
            rows: (n,), which samples.
            out: (N, S), contiguous, of a type that holds this shard's.
            places: (n,), which row of `out` each goes to.

        Raises:
            DataError: a sample is corrupt, or has not S tokens; names file and row.
        """
        length = out.shape[1]
        if length != self._encoding.sample_length or out.dtype != self._encoding.file_dtype:
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                out[place] = self._sample_of(row, length)
            return
        # No copy on the way: what is read is what stays.
        width = out.strides[0]
        target = out.reshape(-1).view(np.uint8).data
        begins, starts = (self._begin + rows * width).tolist(), (places * width).tolist()
        with self._named():
            for begin, start in zip(begins, starts, strict=True):
                part = target[start : start + width]
                if os.preadv(self._file, (part,), begin) != width:
                    self._read_into(begin, part)

    def _sample_of(self, row: int, length: int) -> NDArray[Any]:
        count = self._find(row).count
        if count != length:
            raise self._bad_row(row, f"has {count} tokens, not {length}")
        return self.sample(row)

    def _check_size(self) -> None:
        """Refuse what is not a regular file of the size that the index states."""
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{self._path}: not a regular file.")
        if status.st_size != self._size or self._size < 8:
            raise self._bad(f"it has {status.st_size} bytes; the index says {self._size}")
        if self._size < self._table_end:
            raise self._bad(
                f"{self._size} bytes cannot hold the offsets of {self._samples} samples"
            )

    def _check_offsets(self) -> int:
        """Return where samples begin; every offset is looked at, and none is kept."""
        words = self._words(0, min(2, self._samples + 2))
        if words[0] != self._samples:
            raise self._bad(f"holds {words[0]} samples; the index says {self._samples}")
        begin = before = int(words[1])
        size = self._encoding.sample_bytes
        for first in range(1, self._samples + 2, OFFSETS_AT_ONCE):
            offsets = self._words(first, min(OFFSETS_AT_ONCE, self._samples + 2 - first))
            steps = np.diff(offsets.astype(np.int64), prepend=before)
            if (steps < 0).any():
                raise self._bad("its offsets do not lead through the file")
            if size is not None and (steps[first == 1 :] != size).any():
                raise self._bad(f"not all of its samples have {size} bytes")
            before = int(offsets[-1])
        if begin < self._table_end or before != self._size:
            raise self._bad("its offsets do not lead through the file")
        return begin

    def _check_header(self) -> None:
        """Refuse a file whose own header disagrees with the index on how samples lie."""
        size = self._begin - self._table_end
        if size > HEADER_LIMIT_BYTES:
            raise self._bad(f"its header takes {size} bytes")
        try:
            header = json.loads(self._read(self._table_end, size).decode("utf-8"))
        except (ValueError, RecursionError) as cause:
            raise self._bad("its header is not JSON") from cause
        wanted = shard_config(self._encoding, None, ())
        for key in ("column_encodings", "column_names", "column_sizes"):
            seen = header.get(key) if isinstance(header, dict) else None
            if seen != wanted[key]:
                raise self._bad(f"its header says {key} {seen!r:.80}; expected {wanted[key]}")

    def _find(self, row: int) -> Values:
        """Return where a sample's tokens are, every number on the way there checked."""
        if not 0 <= row < self._samples:
            raise IndexError(row)
        encoding = self._encoding
        if encoding.sample_bytes is not None and encoding.sample_length is not None:
            start = self._begin + row * encoding.sample_bytes
            return Values(encoding.file_dtype, start, encoding.sample_length)
        # The table is read again, and not kept: it may have changed since it was checked.
        start, end = self._words(1 + row, 2).tolist()
        if not self._begin <= start <= end <= self._size:
            raise self._bad("its offsets do not lead through the file")
        return self._parse_head(row, start, end)

    def _parse_head(self, row: int, start: int, end: int) -> Values:
        """Return where the tokens are of a sample that says so itself."""
        head = self._read(start, min(HEAD_BYTES, end - start))
        if len(head) < 4 or int.from_bytes(head[:4], "little") != end - start - 4:
            raise self._bad_row(row, "does not state its own size")
        used, dtype = 4, self._encoding.file_dtype
        if self._encoding.layout == "typed":
            code = head[used] if len(head) > used else 0
            if code not in DTYPE_OF_CODE:
                raise self._bad_row(row, f"has values of type {code}, which are no integers")
            used, dtype = used + 1, np.dtype(DTYPE_OF_CODE[code]).newbyteorder("<")
        count, rest = divmod(end - start - used, dtype.itemsize)
        if self._encoding.layout == "bare":
            if rest:
                raise self._bad_row(row, f"has {end - start - used} bytes, not tokens of 8 each")
            return Values(dtype, start + used, count)
        if len(head) <= used:
            raise self._bad_row(row, "does not state its own size")
        dimensions, width = head[used] >> 2, 1 << (head[used] & 3)
        if dimensions != 1:
            raise self._bad_row(row, f"has {dimensions} dimensions, not 1")
        begin = used + 1 + width
        count = int.from_bytes(head[used + 1 : begin], "little")
        if begin + count * dtype.itemsize != end - start:
            raise self._bad_row(row, f"says {count} tokens, but has {end - start} bytes")
        return Values(dtype, start + begin, count)

    def _words(self, first: int, count: int) -> NDArray[np.uint32]:
        """Return numbers of the table at the beginning of the file."""
        return np.frombuffer(self._read(4 * first, 4 * count), "<u4")

    def _read(self, start: int, size: int) -> bytes:
        buffer = bytearray(size)
        self._read_into(start, memoryview(buffer))
        return bytes(buffer)

    def _read_into(self, start: int, out: memoryview) -> None:
        """Fill the buffer from the file, or say why that cannot be."""
        done = 0
        with self._named():
            while done < len(out):
                count = os.preadv(self._file, (out[done:],), start + done)
                if not count:
                    raise self._bad("it has become shorter since it was opened")
                done += count

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise unreadable(self._path, cause) from cause

    def _bad_row(self, row: int, why: str) -> DataError:
        return self._bad(f"row {row} {why}")

    def _bad(self, what: str) -> DataError:
        return DataError(f"{self._path}: corrupt shard: {what}.")


def unreadable(path: Path | str, cause: OSError) -> DataError:
    """Return what to say of a file that the system does not give us."""
    return DataError(f"{path}: cannot be read: {cause.strerror or cause}.")


def _open(path: Path | str, copy: BinaryIO | None) -> int:
    """Return a descriptor of our own; opening a pipe does not wait for who writes to it."""
    try:
        if copy is None:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with copy:
            return os.dup(copy.fileno())
    except OSError as cause:
        raise unreadable(path, cause) from cause
