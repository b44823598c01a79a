"""Laws of encodings that are read and never written: what each sample says of itself is checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpt.data.reader import Shard
from mpt.data.shard import Encoding, ShardInfo
from mpt.errors import DataError
from tests.data.test_data_hostile import all_rows, shard_bytes


def of_size(sample: bytes) -> bytes:
    return len(sample).to_bytes(4, "little") + sample


def typed(code: int, tokens: list[int], dtype: str) -> bytes:
    return of_size(bytes([code, 4, len(tokens)]) + np.array(tokens, dtype).tobytes())


def test_samples_that_say_their_own_type_are_read(tmp_path: Path) -> None:
    samples = [typed(8, [1, 2], "<u1"), typed(33, [-3], "<i4"), typed(16, [], "<u2")]
    payload = shard_bytes(samples, encoding="ndarray")
    (tmp_path / "x.mds").write_bytes(payload)
    info = ShardInfo("x.mds", len(payload), 3, Encoding.parse("ndarray"), {})
    assert all_rows(Shard(tmp_path / "x.mds", info)) == [[1, 2], [-3], []]


def test_bytes_are_read_as_the_int64_that_llm_foundry_wrote(tmp_path: Path) -> None:
    payload = shard_bytes([of_size(np.arange(3, dtype="<i8").tobytes())], encoding="bytes")
    (tmp_path / "x.mds").write_bytes(payload)
    info = ShardInfo("x.mds", len(payload), 1, Encoding.parse("bytes"), {})
    assert all_rows(Shard(tmp_path / "x.mds", info)) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("encoding", "sample", "words"),
    [
        ("ndarray", of_size(b""), "row 0 has values of type 0"),
        ("ndarray", typed(34, [1], "<f4"), "row 0 has values of type 34, which are no integers"),
        ("ndarray", of_size(bytes([8])), "row 0 does not state its own size"),
        ("ndarray", typed(16, [1], "<u1"), "row 0 says 1 tokens"),
        ("bytes", of_size(b"x" * 9), "row 0 has 9 bytes, not tokens of 8 each"),
    ],
)
def test_what_a_sample_says_wrong_of_itself_is_named(
    tmp_path: Path, encoding: str, sample: bytes, words: str
) -> None:
    (tmp_path / "x.mds").write_bytes(payload := shard_bytes([sample], encoding=encoding))
    info = ShardInfo("x.mds", len(payload), 1, Encoding.parse(encoding), {})
    with pytest.raises(DataError, match=words):
        all_rows(Shard(tmp_path / "x.mds", info))


def test_offsets_that_go_back_are_found_when_a_shard_is_opened(tmp_path: Path) -> None:
    samples = [of_size(np.arange(n, dtype="<i8").tobytes()) for n in (1, 2)]
    end = len(shard_bytes(samples, encoding="bytes"))
    payload = shard_bytes(samples, encoding="bytes", offsets=[end - 32, end - 33, end])
    (tmp_path / "x.mds").write_bytes(payload)
    info = ShardInfo("x.mds", len(payload), 2, Encoding.parse("bytes"), {})
    with pytest.raises(DataError, match="offsets do not lead"):
        Shard(tmp_path / "x.mds", info)
