"""Laws of distrust: a shard or an index of any content is read or refused, and that is all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpt.data.dataset import open_dataset, verify
from mpt.data.index import parse_index
from mpt.data.reader import Shard
from mpt.data.shard import Encoding, ShardInfo, write_shard
from mpt.errors import DataError
from tests.data.cases import write_dataset

INT32 = Encoding("int32", None)


def counting(n: int, length: int = 4) -> NDArray[np.int64]:
    return np.arange(n * length, dtype=np.int64).reshape(n, length)


def all_rows(shard: Shard) -> list[list[int]]:
    return [shard.sample(row).tolist() for row in range(len(shard))]


def edited_index(folder: Path, **changes: Any) -> Path:
    """A sound dataset whose first shard's entry has other values; dotted keys go deeper."""
    write_dataset(folder, counting(3))
    path = folder / "index.json"
    index = json.loads(path.read_text())
    for key, value in changes.items():
        entry = index["shards"][0]
        *parents, last = key.split("__")
        for parent in parents:
            entry = entry[parent]
        entry[last] = value
    path.write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\\b",
        "x\0y",
        "c:x",
        "x\ny",
        "x" * 256,
        "é" * 128,
        "\ud800",
        7,
        None,
    ],
)
def test_a_basename_with_a_path_in_it_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(DataError, match=r"shards\[0\]: raw_data.basename"):
        open_dataset(edited_index(tmp_path / "set", raw_data__basename=name))


def test_a_shard_that_is_a_link_out_of_the_dataset_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", counting(3))
    path = tmp_path / "set" / "shard.00000.mds"
    path.rename(tmp_path / "outside.mds")
    path.symlink_to(tmp_path / "outside.mds")
    with pytest.raises(DataError, match="link that leads out of the dataset"):
        dataset.rows(np.zeros(1, int), np.zeros(1, int))


def test_a_shard_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", counting(3))
    (tmp_path / "set" / "shard.00000.mds").unlink()
    os.mkfifo(tmp_path / "set" / "shard.00000.mds")
    assert "not a regular file" in verify(dataset)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compression": "zstd"}, "zip_data: None is not an object"),
        ({"compression": "br:11", "zip_data": {}}, "compression: 'br:11' is not 'zstd'"),
        ({"zip_data": {"basename": "x"}}, "compression: None is not 'zstd'"),
        ({"compression": "zstd:3", "zip_data": {"basename": "../x"}}, r"zip_data\.basename"),
        ({"compression": "zstd", "zip_data": {"basename": "x", "bytes": -1}}, r"zip_data\.bytes"),
        ({"column_encodings": ["pkl"]}, "encoding 'pkl' cannot be read"),
        ({"column_encodings": ["ndarray:float32:4"]}, "encoding 'ndarray:float32:4'"),
        ({"column_encodings": ["ndarray:uint16:0"]}, "encoding 'ndarray:uint16:0'"),
        ({"column_names": ["tokens", "x"]}, "column_names"),
        ({"column_sizes": [9]}, r"column_sizes: \[9\] is not \[8\]"),
        ({"samples": -1}, "samples: -1 is not an integer from 0"),
        ({"samples": True}, "samples: True"),
        ({"samples": 10**30}, "samples: 10000000"),
        ({"raw_data__bytes": 2**40}, r"raw_data\.bytes"),
        ({"raw_data__hashes": [1]}, r"raw_data\.hashes"),
        ({"raw_data__hashes": {"sha256": 1}}, r"raw_data\.hashes"),
        ({"format": "jsonl"}, "'jsonl' is not mds"),
        ({"version": 3}, "format"),
    ],
)
def test_what_the_index_says_wrong_is_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(edited_index(tmp_path / "set", **changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("9" * 5000, "not a JSON file"),
        ('"\udc80"', "not a JSON file"),
        ("[]", "not an MDS index of version 2"),
        ('{"version": 2}', "shards: not a list"),
        ('{"version": 2, "shards": []}', "without samples"),
        ('{"version": 2, "shards": [1]}', r"shards\[0\]: not an object"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path)


def shard_bytes(
    samples: list[bytes],
    *,
    encoding: str = "ndarray:int32",
    size: int | None = None,
    count: int | None = None,
    offsets: list[int] | None = None,
) -> bytes:
    """A shard file laid out by hand; what is not given is as it should be."""
    config: dict[str, Any] = {"column_encodings": [encoding], "column_names": ["tokens"]}
    header = json.dumps({**config, "column_sizes": [size]}).encode()
    begin = 4 + 4 * (len(samples) + 1) + len(header)
    ends = [begin + sum(map(len, samples[:i])) for i in range(len(samples) + 1)]
    words = [len(samples) if count is None else count, *(offsets or ends)]
    return np.array(words, "<u4").tobytes() + header + b"".join(samples)


SOUND = bytes([6, 0, 0, 0, 4, 1, 7, 0, 0, 0])  # 6 bytes: one dimension, 1 value, 7


END = len(shard_bytes([SOUND, SOUND]))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (shard_bytes([SOUND, SOUND], count=3), "holds 3 samples; the index says 2"),
        (shard_bytes([SOUND, SOUND], offsets=[0, END - 10, END]), "offsets do not lead"),
        (shard_bytes([SOUND, SOUND], offsets=[END - 20, END - 30, END]), "offsets do not lead"),
        (
            shard_bytes([SOUND, SOUND], offsets=[END - 20, END - 10, 2**32 - 1]),
            "offsets do not lead",
        ),
        (shard_bytes([SOUND, SOUND])[:14], "cannot hold the offsets of 2 samples"),
        (shard_bytes([SOUND, SOUND], encoding="ndarray:int64"), "header says column_encodings"),
        (shard_bytes([SOUND, SOUND], size=10), "header says column_sizes 10|header says .* .10."),
        (shard_bytes([SOUND, SOUND]).replace(b"tokens", b"to\xffens"), "header is not JSON"),
        (shard_bytes([SOUND, SOUND]).replace(b'"tokens"', b"[" * 8), "header is not JSON"),
        (shard_bytes([SOUND, b""]), "row 1 does not state its own size"),
        (shard_bytes([SOUND, b"\x00\x00\x00\x00"]), "row 1 does not state its own size"),
        (shard_bytes([SOUND, b"\x07" + SOUND[1:]]), "row 1 does not state its own size"),
        (shard_bytes([SOUND, SOUND[:4] + b"\x08" + SOUND[5:]]), "row 1 has 2 dimensions"),
        (shard_bytes([SOUND, SOUND[:5] + b"\x02" + SOUND[6:]]), "row 1 says 2 tokens"),
        (shard_bytes([SOUND, b"\x01\0\0\0\x07"]), "row 1 says 0 tokens"),
    ],
)
def test_what_a_shard_says_wrong_is_named(tmp_path: Path, payload: bytes, words: str) -> None:
    path = tmp_path / "x.mds"
    path.write_bytes(payload)
    info = ShardInfo("x.mds", len(payload), 2, INT32, {})
    with pytest.raises(DataError, match=rf"x\.mds: corrupt shard: .*({words})"):
        all_rows(Shard(path, info))


def test_a_shard_laid_out_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.mds").write_bytes(payload := shard_bytes([SOUND, SOUND]))
    assert all_rows(Shard(tmp_path / "x.mds", ShardInfo("x", len(payload), 2, INT32, {}))) == [
        *([7], [7])
    ]
    with pytest.raises(DataError, match=f"it has {len(payload)} bytes; the index says 7"):
        Shard(tmp_path / "x.mds", ShardInfo("x", 7, 2, INT32, {}))


def test_fixed_size_samples_of_other_sizes_are_refused(tmp_path: Path) -> None:
    payload = shard_bytes([b"\0" * 6, b"\0" * 2], encoding="ndarray:uint16:2", size=4)
    (tmp_path / "x.mds").write_bytes(payload)
    with pytest.raises(DataError, match="not all of its samples have 4 bytes"):
        Shard(tmp_path / "x.mds", ShardInfo("x", len(payload), 2, Encoding("uint16", 2), {}))


@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), cut=...)
@settings(max_examples=100, deadline=None)
def test_a_damaged_shard_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.mds"
    for encoding, payload in sound_shards(tmp_path_factory.getbasetemp()):
        damaged = bytearray(payload)
        for place, value in edits:
            damaged[place % len(damaged)] = value
        if cut and edits:
            del damaged[edits[0][0] % len(damaged) :]
        path.write_bytes(damaged)
        try:
            shard = Shard(path, ShardInfo(path.name, len(damaged), 3, encoding, {}))
            assert sum(map(len, all_rows(shard))) <= len(payload)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017


def sound_shards(folder: Path) -> list[tuple[Encoding, bytes]]:
    result = []
    for encoding in (INT32, Encoding("uint16", 4)):
        path = folder / f"{encoding.dtype}.mds"
        if not path.exists():
            write_shard(path, counting(3), encoding, size_limit=1, hashes=[])
        result.append((encoding, path.read_bytes()))
    return result


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


KEYS = [
    *("column_encodings", "column_names", "column_sizes", "compression", "format", "hashes"),
    *("raw_data", "samples", "size_limit", "version", "zip_data"),
    *("raw_data__basename", "raw_data__bytes", "raw_data__hashes"),
]


LIKELY = st.sampled_from(
    ["../index.json", "index.json", "ndarray:uint16", "ndarray:int64:4", 0, 3, 100, [8], [None]]
)


@given(st.sampled_from(KEYS), JSON | LIKELY, st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_index_of_any_content_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, delete: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-index"
    if not folder.exists():
        write_dataset(folder, counting(3))
    info = read_index_of_sound(folder)
    *parents, last = key.split("__")
    entry = info["shards"][0]
    for parent in parents:
        entry = entry[parent]
    if delete:
        del entry[last]
    else:
        entry[last] = value
    (folder / "index.json").write_text(json.dumps(info))
    try:
        dataset = open_dataset(folder)
        if verify(dataset) == []:
            dataset.rows(np.zeros(1, int), np.zeros(1, int))
    except DataError as error:
        assert str(folder) in str(error)  # noqa: PT017


def read_index_of_sound(folder: Path) -> Any:
    sound = folder.with_name("sound.json")
    if not sound.exists():
        assert len(parse_index((folder / "index.json").read_bytes(), "x")) == 1
        sound.write_text((folder / "index.json").read_text())
    return json.loads(sound.read_text())


@pytest.mark.parametrize("content", ["[]", "{}", '{"tokenizer_sha256": 1}', "{"])
def test_a_damaged_dataset_json_is_named(tmp_path: Path, content: str) -> None:
    write_dataset(tmp_path / "set", counting(3))
    (tmp_path / "set" / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        open_dataset(tmp_path / "set")
