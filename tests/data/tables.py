"""Tables of texts in the formats that tests read: Delta Lake with deleted rows, MDS of columns."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def append(path: Path, rows: list[dict[str, Any]], **options: Any) -> DeltaTable:
    """Append rows to a Delta table, made if need be: a new version."""
    write_deltalake(str(path), pa.Table.from_pylist(rows), mode="append", **options)
    return DeltaTable(str(path))


def commit(path: Path, actions: Sequence[dict[str, Any]]) -> int:
    """Write the next version of a Delta table's log, and return its number."""
    log = path / "_delta_log"
    version = len(list(log.glob("*.json")))
    text = "".join(json.dumps(action) + "\n" for action in actions)
    (log / f"{version:020d}.json").write_text(text)
    return version


def adds(path: Path) -> list[dict[str, Any]]:
    """The data files that a table's log adds, in its order."""
    logs = sorted((path / "_delta_log").glob("*.json"))
    lines = (json.loads(line) for log in logs for line in log.read_text().splitlines())
    return [line["add"] for line in lines if "add" in line]


def delete_by_vector(path: Path, rows: dict[str, list[int]]) -> int:
    """Delete rows by number, of files by their path in the log, as Spark does: by inline vectors.

    Source: the Delta protocol, "Deletion Vectors".
    """
    features = ["deletionVectors"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features}
    actions: list[dict[str, Any]] = [{"protocol": {**protocol, "writerFeatures": features}}]
    for add in adds(path):
        if add["path"] in rows:
            bits = _bitmap(rows[add["path"]])
            vector = {"storageType": "i", "pathOrInlineDv": _z85(bits), "sizeInBytes": len(bits)}
            vector["cardinality"] = len(rows[add["path"]])
            keys = ("path", "partitionValues", "size")
            gone = {key: add[key] for key in keys} | {"deletionTimestamp": 1, "dataChange": True}
            actions.append({"remove": {**gone, "extendedFileMetadata": True}})
            actions.append({"add": {**add, "deletionVector": vector}})
    return commit(path, actions)


def _bitmap(rows: list[int]) -> bytes:
    """A RoaringBitmapArray of one array container."""
    head = struct.pack("<IQI", 1681511377, 1, 0)
    container = struct.pack("<HHI", 0, len(rows) - 1, 16)
    return head + struct.pack("<II", 12346, 1) + container + struct.pack(f"<{len(rows)}H", *rows)


def _z85(payload: bytes) -> str:
    text = ""
    for (word,) in struct.iter_unpack(">I", payload + b"\0" * (-len(payload) % 4)):
        text += "".join(Z85[word // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return text


def write_mds(
    folder: Path, samples: Sequence[dict[str, bytes]], encodings: dict[str, str], per_shard: int = 3
) -> Path:
    """Write samples of columns of no fixed size as mosaicml-streaming does."""
    folder.mkdir()
    names = sorted(encodings)
    config = {
        "column_names": names,
        "column_encodings": [encodings[name] for name in names],
        "column_sizes": [None] * len(names),
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": 1 << 26,
        "version": 2,
    }
    shards: list[dict[str, Any]] = []
    for start in range(0, len(samples), per_shard):
        parts = [
            struct.pack(f"<{len(names)}I", *(len(sample[name]) for name in names))
            + b"".join(sample[name] for name in names)
            for sample in samples[start : start + per_shard]
        ]
        head = json.dumps(config, sort_keys=True).encode()
        offsets = [4 + 4 * (len(parts) + 1) + len(head)]
        for part in parts:
            offsets.append(offsets[-1] + len(part))
        table = struct.pack(f"<I{len(offsets)}I", len(parts), *offsets)
        payload = table + head + b"".join(parts)
        name = f"shard.{len(shards):05d}.mds"
        (folder / name).write_bytes(payload)
        raw = {"basename": name, "bytes": len(payload), "hashes": {}}
        shards.append({**config, "raw_data": raw, "samples": len(parts), "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder
