"""The samples of one shard of tokens: each checked before its use, and read into its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpt.data.shard import DTYPE_OF_CODE, LAYOUT_KEYS, ShardInfo, shard_config
from mpt.data.shardfile import ShardFile
from mpt.errors import BadRowError

Integers = NDArray[np.int64]

HEAD_BYTES = 14
"""The most before a sample's values: its size, a type, a shape of one number of 8 bytes."""


@dataclass(frozen=True)
class Values:
    """Where the tokens of a sample lie."""

    dtype: np.dtype[Any]
    start: int
    """Of the file."""
    count: int


class Shard:
    """An open shard of tokens; closed when the last reference goes."""

    def __init__(self, path: Path | str, info: ShardInfo, copy: BinaryIO | None = None) -> None:
        """Open a file; as ShardFile does, by what the index says of it."""
        config = shard_config(info.encoding, None, ())
        self._encoding = info.encoding
        self._file = ShardFile(
            path,
            info.file_bytes,
            info.samples,
            {key: config[key] for key in LAYOUT_KEYS},
            copy,
            sample_bytes=info.encoding.sample_bytes,
        )

    def __len__(self) -> int:
        return len(self._file)

    def sample(self, row: int) -> NDArray[Any]:
        """Return one sample's tokens.

        Raises:
            BadRowError: the sample is corrupt; names file and row.
        """
        values = self._find(row)
        tokens = np.empty(values.count, values.dtype)
        if values.count:
            self._file.read_into(values.start, tokens.view(np.uint8).data)
        return tokens.astype(self._encoding.file_dtype, copy=False)

    def read(self, rows: Integers, out: NDArray[Any], places: Integers) -> None:
        """Read samples into some rows of an array.

        Args:
            rows: (n,), which samples.
            out: (N, S), contiguous, of a type that holds this shard's.
            places: (n,), which row of `out` each goes to.

        Raises:
            BadRowError: a sample is corrupt, or has not S tokens; names file and row.
        """
        length = out.shape[1]
        if length != self._encoding.sample_length or out.dtype != self._encoding.file_dtype:
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                out[place] = self._sample_of(row, length)
            return
        # No copy on the way: what is read is what stays.
        width = out.strides[0]
        starts = (self._file.begin + rows * width).tolist()
        target = out.reshape(-1).view(np.uint8).data
        self._file.read_pieces(starts, target, (places * width).tolist(), width)

    def _sample_of(self, row: int, length: int) -> NDArray[Any]:
        count = self._find(row).count
        if count != length:
            raise self._bad_row(row, f"has {count} tokens, not {length}")
        return self.sample(row)

    def _find(self, row: int) -> Values:
        """Return where a sample's tokens are, every number on the way there checked."""
        encoding = self._encoding
        if encoding.sample_bytes is None or encoding.sample_length is None:
            return self._parse_head(row, *self._file.extent(row))
        start = self._file.begin + row * encoding.sample_bytes
        return Values(encoding.file_dtype, start, encoding.sample_length)

    def _parse_head(self, row: int, start: int, end: int) -> Values:
        """Return where the tokens are of a sample that says so itself."""
        head = self._file.read(start, min(HEAD_BYTES, end - start))
        if len(head) < 4 or int.from_bytes(head[:4], "little") != end - start - 4:
            raise self._bad_row(row, "does not state its own size")
        used, dtype = 4, self._encoding.file_dtype
        if self._encoding.layout == "bare":
            count, rest = divmod(end - start - used, dtype.itemsize)
            if rest:
                raise self._bad_row(row, f"has {end - start - used} bytes, not tokens of 8 each")
            return Values(dtype, start + used, count)
        if self._encoding.layout == "typed":
            code = head[used] if len(head) > used else 0
            if code not in DTYPE_OF_CODE:
                raise self._bad_row(row, f"has values of type {code}, which are no integers")
            used, dtype = used + 1, np.dtype(DTYPE_OF_CODE[code]).newbyteorder("<")
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

    def _bad_row(self, row: int, why: str) -> BadRowError:
        return BadRowError(str(self._file.bad(f"row {row} {why}")), why)
