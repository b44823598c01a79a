"""One shard file in MDS version 2, the format of mosaicml-streaming: write it, map it, trust none.

Little-endian: uint32 samples n; uint32 offsets[n + 1] from the start of the file; a JSON
header; the samples. A sample of a fixed-size column is its bare values; otherwise uint32
payload bytes, then a byte (1 << 2 | k), the length in 2**k bytes, and the values.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpt.data.mapped import MappedFile
from mpt.errors import BadRowError, DataError

COLUMN = "tokens"
HASHES = ("sha256",)
"""Recorded for each shard we write."""
LIMIT_BYTES = (1 << 32) - 1
"""Offsets are uint32."""
LAYOUT_KEYS = ("column_encodings", "column_names", "column_sizes")
"""Of a shard's own header, what says how its samples lie."""
ENCODING = re.compile(r"ndarray:(u?int(?:8|16|32|64))(?::([1-9]\d{0,8}))?", re.ASCII)


@dataclass(frozen=True)
class Encoding:
    """How one sample's tokens lie in a shard, such as ndarray:uint16:2048."""

    dtype: str
    """numpy's name of an integer type; always little-endian in the file."""
    sample_length: int | None
    """Tokens of every sample, or null: each sample then says how many it has."""

    @classmethod
    def parse(cls, name: str) -> Encoding:
        """Read MDS's name of an encoding.

        Raises:
            DataError: not an integer array of no or one dimension; names the encoding.
        """
        match = ENCODING.fullmatch(name)
        if match is None:
            raise DataError(
                f"encoding {name[:80]!r} cannot be read; ndarray:uint16:2048 could, "
                "or any integer type, with or without a length."
            )
        return cls(match[1], int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return f"ndarray:{self.dtype}" + (f":{self.sample_length}" if self.sample_length else "")

    @property
    def file_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def sample_bytes(self) -> int | None:
        """Bytes of every sample, or null where they vary."""
        return self.sample_length and self.sample_length * self.file_dtype.itemsize


@dataclass(frozen=True)
class ZippedFile:
    """What index.json says about the file that a shard is compressed in, by zstd."""

    basename: str
    file_bytes: int
    hashes: dict[str, str]
    """Hex digest of the compressed file by algorithm."""


@dataclass(frozen=True)
class ShardInfo:
    """What index.json says about one shard."""

    basename: str
    file_bytes: int
    samples: int
    encoding: Encoding
    hashes: dict[str, str]
    """Hex digest of the file by algorithm."""
    zipped: ZippedFile | None = None
    """The file that lies in the dataset instead, where the shard is compressed."""

    @property
    def stored(self) -> ShardInfo | ZippedFile:
        """The file that lies in the dataset."""
        return self.zipped or self

    @property
    def copy_bytes(self) -> int:
        """What making a copy takes: both files, for a moment, where the shard is compressed."""
        return self.file_bytes + (self.zipped.file_bytes if self.zipped else 0)


def shard_config(
    encoding: Encoding, size_limit: int | None, hashes: Sequence[str]
) -> dict[str, Any]:
    """Return what both index.json and the shard itself say about how the shard was written."""
    return {
        "column_encodings": [str(encoding)],
        "column_names": [COLUMN],
        "column_sizes": [encoding.sample_bytes],
        "compression": None,
        "format": "mds",
        "hashes": list(hashes),
        "size_limit": size_limit,
        "version": 2,
    }


def write_shard(
    path: Path,
    samples: Sequence[NDArray[Any]] | NDArray[Any],
    encoding: Encoding,
    *,
    size_limit: int,
    hashes: Sequence[str] = HASHES,
) -> ShardInfo:
    """Write one shard and make its bytes durable; its name becomes so with its directory.

    Args:
        samples: one-dimensional token arrays, or (n, S); values must fit the encoding.
        size_limit: recorded only; the caller cuts the samples.
        hashes: names of hashlib algorithms.

    Raises:
        DataError: more than LIMIT_BYTES.
    """
    parts = [_encode(np.asarray(sample), encoding) for sample in samples]
    config = json.dumps(shard_config(encoding, size_limit, hashes), sort_keys=True).encode()
    begin = 4 + 4 * (len(parts) + 1) + len(config)
    offsets = begin + np.cumsum([0, *map(len, parts)], dtype=np.int64)
    if offsets[-1] > LIMIT_BYTES:
        raise DataError(f"{path}: {offsets[-1]} bytes do not fit a shard of {LIMIT_BYTES} at most.")
    head = np.concatenate([[len(parts)], offsets]).astype("<u4").tobytes()
    payload = b"".join([head, config, *parts])
    with path.open("xb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    digests = {name: hashlib.new(name, payload).hexdigest() for name in hashes}
    return ShardInfo(path.name, len(payload), len(parts), encoding, digests)


class Shard:
    """A shard file, memory-mapped and checked; closed when the last reference goes."""

    def __init__(self, path: Path | str, info: ShardInfo, copy: BinaryIO | None = None) -> None:
        """Map a file.

        Args:
            path: what to map, and what messages call it.
            copy: map this open file instead. The map shares its lock, until the last view goes.

        Raises:
            DataError: missing, or not a shard, or not the one that `info` describes.
        """
        header = shard_config(info.encoding, None, ())
        wanted = {key: header[key] for key in LAYOUT_KEYS}
        self._encoding = info.encoding
        self._file = MappedFile(path, info.file_bytes, info.samples, wanted, copy)
        self._table = self._view_fixed()

    def __len__(self) -> int:
        return len(self._file)

    def sample(self, row: int) -> NDArray[Any]:
        """Return one sample's tokens: a view into the file.

        Raises:
            BadRowError: the sample is corrupt; names file and row.
        """
        if self._table is not None:
            row_view: NDArray[Any] = self._table[row]
            return row_view
        return self._decode(self._file.raw(row), row)

    def rows(self, rows: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Return samples (n, length) in the file's dtype.

        Raises:
            BadRowError: a sample is corrupt or of another length; names file and row.
        """
        if self._table is not None and self._table.shape[1] == length:
            return self._table[rows]
        result = np.empty((len(rows), length), np.dtype(self._encoding.dtype))
        for place, row in enumerate(rows.tolist()):
            tokens = self.sample(row)
            if len(tokens) != length:
                raise self._bad_row(row, f"has {len(tokens)} tokens, not {length}")
            result[place] = tokens
        return result

    def _view_fixed(self) -> NDArray[Any] | None:
        """Return all samples as one (n, S) view without a copy, if they are of one size."""
        size, length = self._encoding.sample_bytes, self._encoding.sample_length
        if size is None or length is None:
            return None
        if (np.diff(self._file.offsets) != size).any():
            raise self._file.bad(f"not all of its samples have {size} bytes")
        flat = np.frombuffer(
            self._file.bytes,
            self._encoding.file_dtype,
            len(self) * length,
            int(self._file.offsets[0]),
        )
        return flat.reshape(len(self), length)

    def _decode(self, raw: NDArray[np.uint8], row: int) -> NDArray[Any]:
        """Return the values of one variable-size sample, each length checked before its use."""
        head = raw[:5].tobytes()
        if len(head) < 5 or int.from_bytes(head[:4], "little") != len(raw) - 4:
            raise self._bad_row(row, "does not state its own size")
        dimensions, width = head[4] >> 2, 1 << (head[4] & 3)
        if dimensions != 1:
            raise self._bad_row(row, f"has {dimensions} dimensions, not 1")
        count = int.from_bytes(raw[5 : 5 + width].tobytes(), "little")
        if 5 + width + count * self._encoding.file_dtype.itemsize != len(raw):
            raise self._bad_row(row, f"says {count} tokens, but has {len(raw)} bytes")
        return raw[5 + width :].view(self._encoding.file_dtype)

    def _bad_row(self, row: int, why: str) -> BadRowError:
        return self._file.bad_row(row, why)


def _encode(tokens: NDArray[Any], encoding: Encoding) -> bytes:
    """Return one sample's bytes."""
    assert tokens.ndim == 1
    assert encoding.sample_length in (None, len(tokens))
    stored = tokens.astype(encoding.file_dtype)
    assert (stored == tokens).all(), "a token id that the encoding cannot hold"
    values = stored.tobytes()
    if encoding.sample_length is not None:
        return values
    k = next(k for k in range(4) if len(tokens) < 1 << (8 << k))
    payload = bytes([1 << 2 | k]) + len(tokens).to_bytes(1 << k, "little") + values
    return len(payload).to_bytes(4, "little") + payload
