"""Laws of compressed shards: the same samples, from a verified copy of the stated size."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from mpt.data.dataset import Dataset, open_dataset, verify
from mpt.data.loader import eval_batches
from mpt.errors import DataError
from mpt.recipe.data import Cache, Data, Stream
from tests.data.faults import LENGTH, compress, edit_index, files_in, small_dataset
from tests.data.test_data_loader import CPU, MODEL, loader_for, real_rows


def compressed(tmp_path: Path, **how: Any) -> Dataset:
    compress(small_dataset(tmp_path / "set"), **how)
    return open_dataset(tmp_path / "set", Cache(dir=f"{tmp_path}/cache"))


@pytest.mark.parametrize("level", [None, 1, 19])
def test_compressed_shards_hold_the_same_samples_in_the_same_order(
    tmp_path: Path, level: int | None
) -> None:
    plain = small_dataset(tmp_path / "plain")
    compress(small_dataset(tmp_path / "set"), level=level)
    found = []
    for folder in (plain, tmp_path / "set"):
        data = Data(streams={"a": Stream(path=str(folder))}, cache=Cache(dir=f"{tmp_path}/cache"))
        with loader_for(data) as loader:
            found.append([real_rows(loader.next(start)) for start in range(0, 60, 10)])
    assert all(map(torch.equal, *found))
    assert files_in(tmp_path / "cache") == [".mds"] * 3


def test_a_copy_is_made_once_and_nothing_is_written_beside_the_source(tmp_path: Path) -> None:
    dataset = compressed(tmp_path)
    before = sorted(path.name for path in dataset.path.iterdir())
    assert verify(dataset) == []
    copies = {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.mds")}
    assert verify(dataset) == []
    assert copies == {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.mds")}
    assert sorted(path.name for path in dataset.path.iterdir()) == before


def test_uncompressed_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "set")
    data = Data(streams={"a": Stream(path=str(folder))}, cache=Cache(dir=f"{tmp_path}/cache"))
    with loader_for(data) as loader:
        loader.next(0)
    assert not (tmp_path / "cache").exists()


def rewrite(dataset: Dataset, payload: bytes, **zip_data: Any) -> Dataset:
    """Put other bytes in the place of every compressed shard."""

    def change(entry: dict[str, Any]) -> None:
        (dataset.path / entry["zip_data"]["basename"]).write_bytes(payload)
        entry["zip_data"] |= {"bytes": len(payload), "hashes": {}, **zip_data}

    edit_index(dataset.path, change)
    return open_dataset(dataset.path, dataset.store.settings)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (zstandard.compress(bytes(1 << 28)), "decompresses to more than the"),
        (zstandard.compress(b"short"), "decompresses to 5 bytes; the index says"),
        (b"not zstd at all", "cannot be decompressed"),
        (zstandard.compress(b"x" * 1000)[:-4], "decompresses|cannot be decompressed"),
        (b"", "decompresses to 0 bytes"),
    ],
)
def test_a_bomb_and_what_is_no_shard_are_refused_and_leave_no_copy(
    tmp_path: Path, payload: bytes, words: str
) -> None:
    dataset = rewrite(compressed(tmp_path), payload)
    with pytest.raises(DataError, match=rf"shard\.00000\.mds\.zstd: corrupt shard: .*({words})"):
        dataset.open_shard(0)
    sizes = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.*") if "-" in path.name]
    assert sum(sizes) == 0


def test_a_bomb_is_never_written_past_the_size_of_the_index(tmp_path: Path) -> None:
    dataset = rewrite(compressed(tmp_path), zstandard.compress(bytes(1 << 28)))
    least = max(shard.file_bytes for shard in dataset.shards)
    with (tmp_path / "part").open("w+b") as file:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, before[1]))  # more is an OSError
        try:
            with pytest.raises(DataError, match="decompresses to more than"):
                dataset.store._fill(file, dataset.shards[0], tmp_path / "x.mds")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("which", ["zip_data", "raw_data"])
def test_a_compressed_shard_is_checked_against_both_hashes(tmp_path: Path, which: str) -> None:
    def change(entry: dict[str, Any]) -> None:
        entry[which]["hashes"] = {"sha256": "0" * 64}

    dataset = compressed(tmp_path)
    edit_index(dataset.path, change)
    (fault, *_) = verify(open_dataset(dataset.path, dataset.store.settings))
    name = "shard.00000.mds" + ".zstd" * (which == "zip_data")
    assert f"corrupt shard: of {name}, its sha256 is" in fault
    assert "the index says '0000000000000000'" in fault


def test_another_file_of_the_same_size_in_the_place_of_the_source_gets_a_copy_of_its_own(
    tmp_path: Path,
) -> None:
    first = compressed(tmp_path, keep_hashes=False)
    assert first.open_shard(0).sample(0)[0] == 0
    target = first.path / first.shards[0].stored.basename
    raw = bytearray(zstandard.decompress(target.read_bytes()))
    for token in range(1, 256):  # until it compresses to as many bytes
        raw[-2 * LENGTH * first.shards[0].samples] = token
        packed = zstandard.ZstdCompressor(level=3).compress(raw)
        if len(packed) == target.stat().st_size:
            break
    target.unlink()
    target.write_bytes(packed)
    again = open_dataset(first.path, first.store.settings)
    assert again.shards == first.shards
    assert again.open_shard(0).sample(0)[0] == token


def test_a_missing_compressed_shard_and_a_link_out_of_the_dataset_are_named(tmp_path: Path) -> None:
    dataset = compressed(tmp_path)
    path = dataset.path / "shard.00001.mds.zstd"
    path.rename(tmp_path / "outside")
    with pytest.raises(DataError, match=r"shard\.00001\.mds\.zstd: cannot be read"):
        dataset.open_shard(1)
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="link that leads out of the dataset"):
        dataset.open_shard(1)


def test_compressed_held_out_data_are_evaluated(tmp_path: Path) -> None:
    dataset = compressed(tmp_path)
    batches = eval_batches(
        dataset,
        MODEL,
        samples=None,
        microbatch_size=4,
        rank=0,
        world_size=1,
        device=CPU,
    )
    assert len(real_rows(list(batches))) == 20
