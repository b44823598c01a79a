"""Laws of shards and datasets: MDS byte for byte, whole or refused, and never trusted."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpt.data.dataset import check_dataset, open_dataset, verify
from mpt.data.index import format_index
from mpt.data.reader import Shard
from mpt.data.shard import Encoding, ShardInfo, write_shard
from mpt.errors import DataError
from mpt.tokenizer import load_tokenizer
from tests.data.cases import ABOUT, small_model, write_dataset, write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "mds-golden.mds"


GOLDEN_SHA256 = "9c3db743db003a40bd7b1315eb6503d3710ea17ca66ee6c4bb696739c8a2f0f3"


INT32 = Encoding("int32", None)


DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def counting(n: int, length: int = 4) -> NDArray[np.int64]:
    return np.arange(n * length, dtype=np.int64).reshape(n, length)


def all_rows(shard: Shard) -> list[list[int]]:
    return [shard.sample(row).tolist() for row in range(len(shard))]


def test_the_golden_file_is_read() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == GOLDEN_SHA256
    shard = Shard(GOLDEN, ShardInfo(GOLDEN.name, 229, 2, INT32, {}))
    assert all_rows(shard) == [[0, 1, 2], [7, 8]]


def test_the_golden_file_is_written_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "again.mds"
    samples = [np.array([0, 1, 2]), np.array([7, 8])]
    info = write_shard(path, samples, INT32, size_limit=1 << 26, hashes=[])
    assert path.read_bytes() == GOLDEN.read_bytes()
    assert info == ShardInfo("again.mds", 229, 2, INT32, {})


@given(st.sampled_from(DTYPES), st.booleans(), st.data())
@settings(deadline=None)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, fixed: bool, data: st.DataObject
) -> None:
    limits = np.iinfo(dtype)
    lengths = st.just(5) if fixed else st.integers(0, 300)
    values = st.integers(int(limits.min), int(limits.max))
    samples = data.draw(
        st.lists(lengths.flatmap(lambda n: st.lists(values, min_size=n, max_size=n)), max_size=8)
    )
    path = tmp_path_factory.mktemp("shard") / "shard.mds"
    encoding = Encoding(dtype, 5 if fixed else None)
    arrays = [np.array(sample, dtype) for sample in samples]
    info = write_shard(path, arrays, encoding, size_limit=1000)
    assert all_rows(Shard(path, info)) == samples
    assert info.file_bytes == path.stat().st_size
    assert info.hashes == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert Encoding.parse(str(encoding)) == encoding


def test_a_sample_of_2048_uint16_takes_4100_bytes(tmp_path: Path) -> None:
    sizes = [
        write_shard(
            tmp_path / str(n), np.zeros((n, 2048)), Encoding("uint16", 2048), size_limit=1
        ).file_bytes
        for n in (1, 2)
    ]
    assert sizes[1] - sizes[0] == 4100


def test_rows_come_in_the_order_asked_for_across_shards(tmp_path: Path) -> None:
    samples = counting(50)
    dataset = write_dataset(tmp_path / "set", samples, per_shard=7)
    assert dataset.shard_sizes.tolist() == [7] * 7 + [1]
    wanted = np.array([49, 0, 7, 6, 7, 23])
    rows = dataset.rows(wanted // 7, wanted % 7)
    assert rows.dtype == np.uint16
    assert (rows == samples[wanted]).all()
    assert dataset.rows(wanted[:0], wanted[:0]).shape == (0, 4)


def test_the_index_has_the_fields_of_mds_version_2_and_no_others(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", counting(3))
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    assert sorted(index) == ["shards", "version"]
    (shard,) = index["shards"]
    digest = hashlib.sha256((tmp_path / "set" / "shard.00000.mds").read_bytes()).hexdigest()
    assert shard == {
        "column_encodings": ["ndarray:uint16:4"],
        "column_names": ["tokens"],
        "column_sizes": [8],
        "compression": None,
        "format": "mds",
        "hashes": ["sha256"],
        "raw_data": {
            "basename": "shard.00000.mds",
            "bytes": (tmp_path / "set" / "shard.00000.mds").stat().st_size,
            "hashes": {"sha256": digest},
        },
        "samples": 3,
        "size_limit": 84,
        "version": 2,
        "zip_data": None,
    }


def test_a_dataset_of_variable_encoding_without_our_own_file_is_read(tmp_path: Path) -> None:
    samples = list(counting(3))
    info = write_shard(tmp_path / "shard.00000.mds", samples, INT32, size_limit=1, hashes=[])
    (tmp_path / "index.json").write_text(format_index([info], 1))
    dataset = open_dataset(tmp_path)
    assert dataset.about is None
    assert dataset.tokens_per_byte is None
    assert dataset.sample_length == 4
    assert (dataset.rows(np.zeros(3, int), np.arange(3)) == counting(3)).all()
    assert verify(dataset) == []


def test_a_sample_of_another_length_is_named_with_file_and_row(tmp_path: Path) -> None:
    samples = [np.arange(4), np.arange(4), np.arange(3)]
    info = write_shard(tmp_path / "shard.00000.mds", samples, INT32, size_limit=1, hashes=[])
    (tmp_path / "index.json").write_text(format_index([info], 1))
    with pytest.raises(DataError, match=r"shard\.00000\.mds.*row 2 has 3 tokens, not 4"):
        open_dataset(tmp_path).rows(np.zeros(3, int), np.arange(3))


@pytest.mark.parametrize("bit", [0, 100, 2000, -1])
def test_verify_names_the_shard_with_a_flipped_bit_and_no_other(tmp_path: Path, bit: int) -> None:
    dataset = write_dataset(tmp_path / "set", counting(50))
    path = tmp_path / "set" / "shard.00003.mds"
    payload = bytearray(path.read_bytes())
    payload[bit // 8] ^= 1 << bit % 8
    path.write_bytes(payload)
    (fault,) = verify(dataset)
    assert str(path) in fault
    parts = [verify(dataset, rank=rank, world_size=3) for rank in range(3)]
    assert [len(part) for part in parts] == [1, 0, 0]


def test_verify_names_missing_and_truncated_and_exchanged_shards(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", counting(50))
    assert verify(dataset) == []
    paths = [tmp_path / "set" / f"shard.0000{i}.mds" for i in range(8)]
    paths[1].unlink()
    os.truncate(paths[2], 100)
    first, second = paths[4].read_bytes(), paths[5].read_bytes()
    paths[4].write_bytes(second)
    paths[5].write_bytes(first)
    faults = verify(open_dataset(tmp_path / "set"))
    assert len(faults) == 4
    for fault, number in zip(faults, (1, 2, 4, 5), strict=True):
        assert str(paths[number]) in fault


def test_a_dataset_fits_only_its_own_tokenizer_and_sample_length(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", counting(3))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer.model"))
    with pytest.raises(DataError, match="made with the tokenizer of sha256 000000000000"):
        check_dataset(dataset, small_model(4), tokenizer)
    with pytest.raises(DataError, match=r"samples of 4 tokens, but model\.max_seq_len is 8"):
        check_dataset(dataset, small_model(8), tokenizer)
    with pytest.raises(DataError, match=r"300 ids, but model\.vocab_size is 299"):
        check_dataset(dataset, small_model(4, vocab_size=299), tokenizer)
    about = json.loads((tmp_path / "set" / "dataset.json").read_text())
    about["tokenizer_sha256"] = tokenizer.sha256
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(about))
    check_dataset(open_dataset(tmp_path / "set"), small_model(4), tokenizer)


def test_no_dataset_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it has no index\.json"):
        open_dataset(tmp_path)


def test_tokens_per_byte_counts_the_tokens_of_the_text(tmp_path: Path) -> None:
    about = ABOUT.__class__(**{**ABOUT.__dict__, "tokens": 50, "text_bytes": 200})
    assert about.tokens_per_byte == 0.25
