"""A shard file as it lies: mapped, its table of samples checked, whatever its columns hold."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpt.errors import BadRowError, DataError

HEADER_LIMIT_BYTES = 1 << 16


class MappedFile:
    """A memory-mapped shard whose every offset lies within the file."""

    def __init__(
        self,
        path: Path | str,
        file_bytes: int,
        samples: int,
        header: Mapping[str, Any],
        copy: BinaryIO | None = None,
    ) -> None:
        """Map a file.

        Args:
            path: what to map, and what messages call it.
            file_bytes, samples: what the index says that it has.
            header: what its own header must say, by key.
            copy: map this open file instead. The map shares its lock, until the last view goes.

        Raises:
            DataError: missing, or not a shard, or not the one that is described.
        """
        self._path = path
        self.bytes = _map(path, file_bytes, copy)
        self.offsets = self._read_offsets(samples)
        """Where samples begin and end, int64 (n + 1,)."""
        self._check_header(header)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, row: int) -> NDArray[np.uint8]:
        """Return the bytes of one sample: a view into the file."""
        return self.bytes[self.offsets[row] : self.offsets[row + 1]]

    def bad(self, what: str) -> DataError:
        """Return the error for a shard that is not what it should be."""
        return DataError(f"{self._path}: corrupt shard: {what}.")

    def bad_row(self, row: int, why: str) -> BadRowError:
        """Return the error for one sample that is not what it should be."""
        return BadRowError(f"{self._path}: corrupt shard: row {row} {why}.", why)

    def _read_offsets(self, samples: int) -> NDArray[np.int64]:
        size = len(self.bytes)
        table_end = 4 + 4 * (samples + 1)
        if size < table_end:
            raise self.bad(f"{size} bytes cannot hold the offsets of {samples} samples")
        words = np.frombuffer(self.bytes, "<u4", samples + 2)
        if words[0] != samples:
            raise self.bad(f"holds {words[0]} samples; the index says {samples}")
        offsets = words[1:].astype(np.int64)
        if offsets[0] < table_end or offsets[-1] != size or (np.diff(offsets) < 0).any():
            raise self.bad("its offsets do not lead through the file")
        return offsets

    def _check_header(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a file whose own header disagrees with the index on how samples lie."""
        start, end = 4 + 4 * len(self.offsets), int(self.offsets[0])
        if end - start > HEADER_LIMIT_BYTES:
            raise self.bad(f"its header takes {end - start} bytes")
        try:
            header = json.loads(self.bytes[start:end].tobytes().decode("utf-8"))
        except (ValueError, RecursionError) as cause:
            raise self.bad("its header is not JSON") from cause
        for key, value in wanted.items():
            seen = header.get(key) if isinstance(header, dict) else None
            if seen != value:
                raise self.bad(f"its header says {key} {seen!r:.80}; expected {value}")


def _map(path: Path | str, expected_bytes: int, copy: BinaryIO | None) -> NDArray[np.uint8]:
    """Map a regular file of the size that the index states; nothing is read yet."""
    try:
        if copy is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe: waits for ever
            raise DataError(f"{path}: not a regular file.")
        with copy or Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected_bytes or size < 8:
                raise DataError(
                    f"{path}: corrupt shard: it has {size} bytes; the index says {expected_bytes}."
                )
            return np.memmap(file, np.uint8, "r", shape=(size,))
    except OSError as cause:
        raise DataError(f"{path}: cannot be read: {cause.strerror or cause}.") from cause
