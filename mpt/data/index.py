"""index.json, the list of a dataset's shards: written as mosaicml-streaming does, never trusted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mpt.data.shard import COLUMN, LIMIT_BYTES, Encoding, ShardInfo, ZippedFile, shard_config
from mpt.data.textshard import Column, TextShardInfo
from mpt.errors import DataError
from mpt.storage import parse_json

INDEX_NAME = "index.json"
LIMIT_INDEX_BYTES = 1 << 27
"""Some 300,000 shards."""
LIMIT_NAME_BYTES = 255
"""Of a file system."""
ZSTD = re.compile(r"zstd(:-?\d{1,6})?", re.ASCII)


def format_index(shards: Sequence[ShardInfo], size_limit: int) -> str:
    """Return the text of an index.json."""
    entries = [
        shard_config(shard.encoding, size_limit, list(shard.hashes))
        | {
            "raw_data": {
                "basename": shard.basename,
                "bytes": shard.file_bytes,
                "hashes": shard.hashes,
            },
            "samples": shard.samples,
            "zip_data": None,
        }
        for shard in shards
    ]
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True)


def has_index(directory: Path) -> bool:
    """Say whether a complete dataset is there; False as well where one may not look."""
    return os.path.isfile(directory / INDEX_NAME)


def parse_index(payload: bytes, where: str) -> tuple[ShardInfo, ...]:
    """Return the shards that the bytes of an index.json name, every value checked.

    Args:
        where: the path or URL they are from, for messages.

    Raises:
        DataError: damaged, hostile or of a kind that is not read; names the shard and the key.
    """
    return tuple(entry.info() for entry in _entries(payload, where))


def parse_text_index(payload: bytes, where: str) -> tuple[TextShardInfo, ...]:
    """Return the shards of any columns that the bytes of an index.json name; as parse_index."""
    return tuple(entry.text_info() for entry in _entries(payload, where))


def _entries(payload: bytes, where: str) -> Iterator[_Entry]:
    index = parse_json(payload, where)
    if not isinstance(index, dict) or index.get("version") != 2:
        raise DataError(f"{where}: not an MDS index of version 2.")
    entries = index.get("shards")
    if not isinstance(entries, list):
        raise DataError(f"{where}: shards: not a list.")
    for number, entry in enumerate(entries):
        yield _Entry(entry, f"{where}: shards[{number}]")


class _Entry:
    """One shard's JSON, and where it stands, for messages."""

    def __init__(self, entry: Any, where: str) -> None:
        self._where = where
        if not isinstance(entry, dict):
            raise DataError(f"{where}: not an object.")
        self._entry = entry

    def info(self) -> ShardInfo:
        """Return the entry with every value checked."""
        basename, file_bytes, samples, hashes = self._raw_file()
        encoding = self._encoding()
        return ShardInfo(basename, file_bytes, samples, encoding, hashes, self._zipped())

    def text_info(self) -> TextShardInfo:
        """Return the entry, whatever its columns, with every value checked."""
        basename, file_bytes, samples, hashes = self._raw_file()
        columns = self._columns()
        return TextShardInfo(basename, file_bytes, samples, columns, hashes, self._zipped())

    def _raw_file(self) -> tuple[str, int, int, dict[str, str]]:
        """Return name, bytes, samples and hashes of the shard as it is read."""
        if self._entry.get("format") != "mds" or self._entry.get("version") != 2:
            self._refuse("format", self._entry.get("format"), "mds of version 2")
        basename, file_bytes, hashes = self._file("raw_data")
        # Each sample takes an offset of 4 bytes, so this bounds what a reader allocates.
        samples = self._count(self._entry.get("samples"), "samples", file_bytes // 4)
        return basename, file_bytes, samples, hashes

    def _columns(self) -> tuple[Column, ...]:
        names = self._get("column_names", list, "a list")
        encodings = self._get("column_encodings", list, "a list")
        sizes = self._get("column_sizes", list, "a list")
        if not len(names) == len(encodings) == len(sizes) > 0:
            self._refuse("column_sizes", sizes, "as long as column_names and column_encodings")
        for name, encoding in zip(names, encodings, strict=True):
            if not isinstance(name, str) or not isinstance(encoding, str):
                self._refuse("column_names", names, "a list of texts, with encodings")
        for size in sizes:
            if size is not None:
                self._count(size, "column_sizes", LIMIT_BYTES)
        return tuple(map(Column, names, encodings, sizes))

    def _zipped(self) -> ZippedFile | None:
        """Return the compressed file, if the shard lies in one."""
        compression = self._entry.get("compression")
        if compression is None and self._entry.get("zip_data") is None:
            return None
        if not isinstance(compression, str) or not ZSTD.fullmatch(compression):
            self._refuse("compression", compression, "'zstd', the one that is read, or null")
        return ZippedFile(*self._file("zip_data"))

    def _file(self, key: str) -> tuple[str, int, dict[str, str]]:
        """Return name, bytes and hashes of a file."""
        file = self._get(key, dict, "an object")
        return (
            self._basename(file.get("basename"), key),
            self._count(file.get("bytes"), f"{key}.bytes", LIMIT_BYTES),
            self._hashes(file.get("hashes", {}), key),
        )

    def _encoding(self) -> Encoding:
        names = self._get("column_names", list, "a list")
        if names != [COLUMN]:
            self._refuse("column_names", names, f"[{COLUMN!r}], the one column that is read")
        encodings = self._get("column_encodings", list, "a list")
        if len(encodings) != 1 or not isinstance(encodings[0], str):
            self._refuse("column_encodings", encodings, "one name")
        try:
            encoding = Encoding.parse(encodings[0])
        except DataError as cause:
            raise DataError(f"{self._where}: column_encodings: {cause}") from cause
        if (sizes := self._entry.get("column_sizes")) != [encoding.sample_bytes]:
            self._refuse("column_sizes", sizes, f"[{encoding.sample_bytes}], as it is {encoding}")
        return encoding

    def _basename(self, name: Any, key: str) -> str:
        """Return a file name that cannot lead out of the dataset."""
        if (
            not isinstance(name, str)
            or not 0 < len(name) <= LIMIT_NAME_BYTES
            or name in (".", "..")
        ):
            self._refuse(f"{key}.basename", name, "a file name")
        if any(sign in name for sign in "/\\\0:") or not name.isprintable():
            self._refuse(f"{key}.basename", name, "a file name without a path")
        if len(name.encode()) > LIMIT_NAME_BYTES:
            self._refuse(f"{key}.basename", name, f"a file name of {LIMIT_NAME_BYTES} bytes")
        return name

    def _hashes(self, hashes: Any, key: str) -> dict[str, str]:
        if not isinstance(hashes, dict) or not all(isinstance(v, str) for v in hashes.values()):
            self._refuse(f"{key}.hashes", hashes, "hex digests by algorithm")
        return hashes

    def _count(self, value: Any, key: str, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            self._refuse(key, value, f"an integer from 0 to {most}")
        return value

    def _get(self, key: str, kind: type, name: str) -> Any:
        value = self._entry.get(key)
        if not isinstance(value, kind):
            self._refuse(key, value, name)
        return value

    def _refuse(self, key: str, seen: Any, expected: str) -> NoReturn:
        raise DataError(f"{self._where}: {key}: {seen!r:.80} is not {expected}.")
