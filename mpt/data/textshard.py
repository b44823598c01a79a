"""A shard whose samples have text in one of several columns, as mosaicml-streaming writes them.

A sample is uint32 sizes of its columns of no fixed size, then the bytes of all its columns, both in
the order of the names. Source: streaming.base.format.mds.writer.MDSWriter.encode_joint_shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpt.data.shard import ZippedFile
from mpt.data.shardfile import ShardFile

TEXT_ENCODINGS = ("str", "json", "bytes")


@dataclass(frozen=True)
class Column:
    name: str
    encoding: str
    """MDS's name of it, such as str or ndarray:int32."""
    size: int | None
    """Bytes in every sample, or null where they vary."""


@dataclass(frozen=True)
class TextShardInfo:
    """What index.json says about one shard."""

    basename: str
    file_bytes: int
    samples: int
    columns: tuple[Column, ...]
    hashes: dict[str, str]
    """Hex digest of the file by algorithm."""
    zipped: ZippedFile | None = None
    """The file that lies in the dataset instead, where the shard is compressed."""


class TextShard:
    """An open shard, read column by column."""

    def __init__(self, path: Path | str, info: TextShardInfo, copy: BinaryIO | None = None) -> None:
        """Open a file; as ShardFile does."""
        header = {
            "column_names": [column.name for column in info.columns],
            "column_encodings": [column.encoding for column in info.columns],
            "column_sizes": [column.size for column in info.columns],
        }
        self._file = ShardFile(path, info.file_bytes, info.samples, header, copy)
        self._columns = info.columns

    def payloads(self, number: int) -> Iterator[bytes]:
        """Yield what each sample has in one column.

        Raises:
            DataError: a sample is corrupt; names file and row.
        """
        n_varying = sum(column.size is None for column in self._columns)
        for row in range(len(self._file)):
            raw = self._file.raw(row)
            if len(raw) < 4 * n_varying:
                raise self._file.bad(f"row {row} has {len(raw)} bytes")
            varying = iter(np.frombuffer(raw, "<u4", n_varying).tolist())
            sizes = [next(varying) if c.size is None else c.size for c in self._columns]
            if 4 * n_varying + sum(sizes) != len(raw):
                raise self._file.bad(
                    f"row {row} has {len(raw)} bytes; its columns add up to others"
                )
            start = 4 * n_varying + sum(sizes[:number])
            yield raw[start : start + sizes[number]]
