"""One shard file in MDS version 2, the format of mosaicml-streaming: what it is, and writing it.

Little-endian: uint32 samples n; uint32 offsets[n + 1] from the start of the file; a JSON
header; the samples. A sample of a fixed-size column is its bare values; otherwise uint32
payload bytes, then what its layout says (see `Layout`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpt.errors import DataError

COLUMN = "tokens"
HASHES = ("sha256",)
"""Recorded for each shard we write."""
LIMIT_BYTES = (1 << 32) - 1
"""Offsets are uint32."""
LAYOUT_KEYS = ("column_encodings", "column_names", "column_sizes")
"""Of a shard's own header, what says how its samples lie."""
ENCODING = re.compile(r"ndarray:(u?int(?:8|16|32|64))(?::([1-9]\d{0,8}))?", re.ASCII)
DTYPE_OF_CODE = {
    8: "uint8",
    16: "uint16",
    32: "uint32",
    64: "uint64",
    9: "int8",
    17: "int16",
    33: "int32",
    65: "int64",
}
"""Integer types by the number that MDS gives them."""
Layout = Literal["sized", "typed", "bare"]
"""What stands between a sample's size and its values, where samples vary in size.

sized: a byte (1 << 2 | k), then the length in 2**k bytes. `ndarray:int32`.
typed: the same after a byte that says the type, of DTYPE_OF_CODE. `ndarray`.
bare: nothing, and the values are int64, as llm-foundry wrote its first datasets. `bytes`.
"""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one sample's tokens lie in a shard, such as ndarray:uint16:2048."""

    dtype: str
    """numpy's name of an integer type; always little-endian in the file. Where each sample says
    its own, int64, which they are read as."""
    sample_length: int | None
    """Tokens of every sample, or null: each sample then says how many it has."""
    layout: Layout = "sized"

    @classmethod
    @lru_cache(maxsize=64)
    def parse(cls, name: str) -> Encoding:
        """Read MDS's name of an encoding.

        Raises:
            DataError: not an integer array of no or one dimension; names the encoding.
        """
        match name:
            case "ndarray":
                return cls("int64", None, "typed")
            case "bytes":
                return cls("int64", None, "bare")
        match = ENCODING.fullmatch(name)
        if match is None:
            raise DataError(
                f"encoding {name[:80]!r} cannot be read; ndarray:uint16:2048 could, "
                "or any integer type, with or without a length."
            )
        return cls(match[1], int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        match self.layout:
            case "typed":
                return "ndarray"
            case "bare":
                return "bytes"
        return f"ndarray:{self.dtype}" + (f":{self.sample_length}" if self.sample_length else "")

    @property
    def file_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def sample_bytes(self) -> int | None:
        """Bytes of every sample, or null where they vary."""
        return self.sample_length and self.sample_length * self.file_dtype.itemsize


@dataclass(frozen=True, slots=True)
class ZippedFile:
    """What index.json says about the file that a shard is compressed in, by zstd."""

    basename: str
    file_bytes: int
    hashes: dict[str, str]
    """Hex digest of the compressed file by algorithm."""


@dataclass(frozen=True, slots=True)
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


def common_dtype(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """Return the narrowest integer type for all of them; int64 where uint64 meets signed ones."""
    common = np.result_type(*set(dtypes))
    return common if common.kind in "iu" else np.dtype(np.int64)


def _encode(tokens: NDArray[Any], encoding: Encoding) -> bytes:
    """Return one sample's bytes."""
    assert tokens.ndim == 1
    assert encoding.sample_length in (None, len(tokens))
    assert encoding.layout == "sized", "the others are read, never written"
    stored = tokens.astype(encoding.file_dtype)
    assert (stored == tokens).all(), "a token id that the encoding cannot hold"
    values = stored.tobytes()
    if encoding.sample_length is not None:
        return values
    k = next(k for k in range(4) if len(tokens) < 1 << (8 << k))
    payload = bytes([1 << 2 | k]) + len(tokens).to_bytes(1 << k, "little") + values
    return len(payload).to_bytes(4, "little") + payload
