"""Mutants of sound indexes and shards: the n-th is the same in every run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NAMES: list[Any] = [
    *("../outside.mds", "/etc/passwd", "..", ".", "", "a/../../b", "x\0.mds", "%2e%2e%2fpasswd"),
    *("..%2foutside.mds", "%00", "file:///etc/passwd", "\\\\host\\share", "C:\\x", "x" * 300),
    *("~/.bashrc", "~root", "$HOME", "shard.00000.mds\n", "link.mds", "pipe.mds", "folder"),
    *("x" * 100_000, "\ud800", "é" * 200, "index.json", "shard.00001.mds", None, 7, [], {}),
]
NUMBERS: list[Any] = [
    *(0, -1, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**400, -(2**63), 1e308, 0.5, True, None),
    *("7", "9" * 5000, [], {}),
]
ENCODINGS: list[Any] = [
    *("ndarray", "bytes", "pkl", "str", "ndarray:uint8", "ndarray:uint64:4", "ndarray:uint16:4"),
    *("ndarray:float32:4", "ndarray:uint16:999999999", "ndarray:uint16:-1", "ndarray:uint16:4,4"),
    *("ndarray:object:4", "ndarray:uint16:00", "", None, 3),
]
OTHERS: list[Any] = [None, "zstd", "zstd:3", "br:11", "zstd:-99", "mds", "jsonl", 3, [], {}, [[]]]
JUNK = [b"[" * 10**5, b'{"a":' * 10**5, b"", b"9" * 10**5, b"\xff\xfe", b"1e999"]
PIECES = [b"[" * 5000, b"\xff" * 8, b"\0" * 8, b"{}"]


class Mutants:
    """A dataset that is written anew, each time with something else wrong."""

    def __init__(self, kind: str, folder: Path) -> None:
        """Keep what is sound; `kind` says what is mutated: index, shard or zipped."""
        self._kind, self._folder = kind, folder
        self._index = (folder / "index.json").read_bytes()
        self._shards = {path.name: path.read_bytes() for path in sorted(folder.glob("shard.*"))}

    def write(self, number: int) -> None:
        """Write the number-th mutant over the one before."""
        draw = random.Random(f"{self._kind} {number}")
        if self._kind == "index":
            (self._folder / "index.json").write_bytes(_mutant_index(self._index, draw))
            return
        for name, sound in self._shards.items():
            (self._folder / name).write_bytes(sound)
        name = sorted(self._shards)[number % len(self._shards)]
        payload = _mutant_bytes(self._shards[name], draw)
        (self._folder / name).write_bytes(payload)
        index = json.loads(self._index)
        for entry in index["shards"]:  # its size is as stated, so that what is inside is looked at
            for key in ("raw_data", "zip_data"):
                if entry[key] and entry[key]["basename"] == name:
                    entry[key] |= {"bytes": len(payload), "hashes": {}}
        (self._folder / "index.json").write_text(json.dumps(index))


def _mutant_index(sound: bytes, draw: random.Random) -> bytes:
    match draw.randrange(50):
        case 0:
            return draw.choice(JUNK)
        case number if number < 12:
            return _mutant_bytes(sound, draw)
    index = json.loads(sound)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if isinstance(index["shards"], list) and index["shards"]:
            _change(index, draw.choice(index["shards"]), draw)
    return json.dumps(index).encode()


def _change(index: dict[str, Any], entry: Any, draw: random.Random) -> None:
    """Change one thing of a shard's entry, or of the index."""
    if not isinstance(entry, dict):
        return
    file = draw.choice(["raw_data", "zip_data"])
    match draw.randrange(11):
        case 0 | 1:
            _set(entry, file, "basename", draw.choice(NAMES))
        case 2:
            _set(entry, file, "bytes", draw.choice(NUMBERS))
        case 3:
            _set(entry, file, "hashes", draw.choice(OTHERS))
        case 4:
            entry["samples"] = draw.choice([*NUMBERS, *range(9)])
        case 5:
            entry["column_encodings"] = [draw.choice(ENCODINGS)]
        case 6:
            entry["column_sizes"] = [draw.choice(NUMBERS)]
        case 7:
            entry |= {"column_sizes": [None], "column_encodings": [draw.choice(ENCODINGS)]}
        case 8:
            entry[draw.choice([*entry, "x"])] = draw.choice(OTHERS)
        case 9:
            entry.pop(draw.choice([*entry, "x"]), None)
        case 10:
            index[draw.choice(["version", "shards"])] = draw.choice(OTHERS)


def _set(entry: dict[str, Any], file: str, key: str, value: Any) -> None:
    if not isinstance(entry.get(file), dict):
        entry |= {file: {"basename": "shard.00001.mds", "bytes": 100, "hashes": {}}}
        entry["compression"] = "zstd"
    entry[file][key] = value


def _mutant_bytes(sound: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, insert, or put extreme integers where integers are."""
    payload = bytearray(sound)
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(len(payload) or 1)
        # Most of the trouble is in the first bytes: the count, the offsets, the header.
        place = draw.choice([place, min(place, draw.randrange(200))])
        match draw.randrange(6):
            case 0:
                payload[place : place + 1] = draw.randbytes(1)
            case 1:
                del payload[place:]
            case 2:
                value = draw.choice([0, 1, 2**31, 2**32 - 1, len(payload), len(payload) + 1])
                payload[place // 4 * 4 : place // 4 * 4 + 4] = value.to_bytes(4, "little")
            case 3:
                payload[place:place] = draw.randbytes(draw.choice([1, 4, 100]))
            case 4:
                del payload[place : place + draw.choice([1, 4, 40])]
            case 5:
                payload[place : place + 8] = draw.choice(
                    [b"[" * 5000, b"\xff" * 8, b"\0" * 8, b"{}"]
                )
    return bytes(payload)
