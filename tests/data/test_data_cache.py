"""Laws of the cache: shared by processes, never half a file, and careful in what it deletes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from mpt.data import cache as files
from mpt.data.dataset import open_dataset, verify
from mpt.errors import DataError
from mpt.recipe.data import Cache, Data, Stream
from tests.data.faults import (
    FaultyServer,
    compress,
    edit_index,
    files_in,
    serving,
    small_dataset,
)
from tests.data.test_data_loader import loader_for

pytestmark = pytest.mark.usefixtures("quick")

RANK = """
import sys
from mpt.data.dataset import open_dataset
from mpt.recipe.data import Cache
url, folder = sys.argv[1:3]
dataset = open_dataset(url, Cache(dir=folder))
print("open", flush=True)
sys.stdin.readline()
print([dataset.open_shard(i).sample(0).tolist()[0] for i in range(len(dataset.shards))], flush=True)
"""


def start_rank(stack: ExitStack, url: str, cache: Path) -> subprocess.Popen[str]:
    """A process that has opened the dataset, and reads all of it after a line on its stdin."""
    rank = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", RANK, url, str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(rank.kill)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "open\n"
    return rank


def go(rank: subprocess.Popen[str]) -> None:
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


def test_two_ranks_share_every_download(tmp_path: Path, server: FaultyServer) -> None:
    with ExitStack() as stack:
        ranks = [start_rank(stack, server.url, tmp_path / "cache") for _ in range(2)]
        for rank in ranks:
            go(rank)
        assert [rank.stdout and rank.stdout.readline() for rank in ranks] == ["[0, 28, 56]\n"] * 2
    asked = [name for name, _ in server.requests if name.endswith(".mds")]
    assert sorted(asked) == [f"shard.0000{i}.mds" for i in range(3)]
    assert files_in(tmp_path / "cache") == [".mds"] * 3


@pytest.mark.parametrize("zipped", [False, True])
def test_a_rank_killed_in_a_download_leaves_nothing_whole_and_another_goes_on_from_there(
    tmp_path: Path, server: FaultyServer, zipped: bool
) -> None:
    if zipped:
        compress(tmp_path / "set")
    name = "shard.00000.mds" + ".zstd" * zipped
    server.faults[name] = ["hang"]
    with ExitStack() as stack:
        first, second = (start_rank(stack, server.url, tmp_path / "cache") for _ in range(2))
        go(first)
        server.stalled.wait()
        go(second)  # waits for the first, which holds the shard
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert ".mds" not in files_in(tmp_path / "cache") or len(server.asked(name)) == 2
        assert second.stdout
        assert second.stdout.readline() == "[0, 28, 56]\n"
    assert len(server.asked(name)) == 2
    assert files_in(tmp_path / "cache") == [".mds"] * 3
    assert verify(open_dataset(server.url, Cache(dir=f"{tmp_path}/cache"))) == []


def test_what_an_interrupted_call_left_is_gone_on_with_only_if_a_hash_tells_it_is_right(
    tmp_path: Path, server: FaultyServer
) -> None:
    settings = Cache(dir=f"{tmp_path}/cache")
    for hashes in (True, False):
        if not hashes:
            edit_index(tmp_path / "set", lambda entry: entry["raw_data"].update(hashes={}))
        dataset = open_dataset(server.url, settings)
        info, folder = dataset.shards[0], files.open_folder(settings.dir)
        part = folder / f"{dataset.store._key(info)}-{info.file_bytes}.part"
        part.write_bytes((tmp_path / "set" / info.basename).read_bytes()[:40])
        dataset.open_shard(0)
        assert server.asked(info.basename)[-1] == ("bytes=40-" if hashes else None)


def test_wrong_bytes_that_an_interrupted_call_left_are_thrown_away(
    tmp_path: Path, server: FaultyServer
) -> None:
    settings = Cache(dir=f"{tmp_path}/cache")
    dataset = open_dataset(server.url, settings)
    info, folder = dataset.shards[0], files.open_folder(settings.dir)
    part = folder / f"{dataset.store._key(info)}-{info.file_bytes}.part"
    for junk in (b"x" * 40, b"x" * info.file_bytes, b"x" * (info.file_bytes + 9)):
        part.write_bytes(junk)
        dataset.open_shard(0)
        (copy,) = folder.glob("*.mds")
        assert copy.read_bytes() == (tmp_path / "set" / info.basename).read_bytes()
        copy.unlink()


def test_a_copy_of_another_size_is_made_again(tmp_path: Path, server: FaultyServer) -> None:
    dataset = open_dataset(server.url, Cache(dir=f"{tmp_path}/cache"))
    dataset.open_shard(0)
    (copy,) = (tmp_path / "cache").rglob("*.mds")
    copy.write_bytes(b"cut")
    dataset.open_shard(0)
    assert len(server.asked("shard.00000.mds")) == 2
    assert verify(dataset) == []


def test_a_damaged_copy_is_found_by_verify(tmp_path: Path, server: FaultyServer) -> None:
    dataset = open_dataset(server.url, Cache(dir=f"{tmp_path}/cache"))
    dataset.open_shard(0)
    (copy,) = (tmp_path / "cache").rglob("*.mds")
    payload = bytearray(copy.read_bytes())
    payload[-1] ^= 1
    copy.write_bytes(payload)
    (fault,) = verify(dataset)
    assert f"{server.url}/shard.00000.mds: corrupt shard: its sha256" in fault
    assert fault.endswith(f"delete {copy}.")


def ours(folder: Path, number: int, size: int = 100, kind: str = "mds") -> Path:
    path = folder / f"{number:040x}-{size}.{kind}"
    path.write_bytes(bytes(size))
    os.utime(path, (number, number))
    return path


def test_the_shards_used_longest_ago_go_first_and_only_as_many_as_must(tmp_path: Path) -> None:
    folder = files.open_folder(str(tmp_path))
    paths = [ours(folder, number) for number in range(1, 6)]
    files.evict(folder, 500)
    assert all(path.exists() for path in paths)
    whole = files.open_whole(paths[0], 100)  # now the one used last
    assert whole is not None
    whole.close()
    files.evict(folder, 299)
    assert [path.exists() for path in paths] == [True, False, False, False, True]


def test_eviction_touches_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    folder = files.open_folder(str(tmp_path))
    key = "0" * 40
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    foreign = [
        folder / name
        for name in ("notes.txt", f"{key}.mds", f"{key}-10.mds.bak", "x.mds", f"{key}-1.json")
    ]
    for path in foreign:
        path.write_bytes(bytes(1000))
    (folder / f"{key}-9.mds").symlink_to(outside)
    (folder / f"{key}-8.mds").mkdir()
    dead = [ours(folder, 1), ours(folder, 2, kind="part"), ours(folder, 3, kind="zst")]
    files.evict(folder, 0)
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in foreign)
    assert outside.exists()
    assert (folder / f"{key}-9.mds").is_symlink()
    assert (folder / f"{key}-8.mds").is_dir()


def test_eviction_spares_what_another_process_reads_or_makes(
    tmp_path: Path, server: FaultyServer
) -> None:
    cache = tmp_path / "cache"
    folder = files.open_folder(str(cache))
    server.faults["shard.00001.mds"] = ["hang!"]
    with ExitStack() as stack:
        rank = start_rank(stack, server.url, cache)
        go(rank)
        server.stalled.wait()  # shard 1 is being made; shard 0 is open no more
        files.evict(folder, 0)
        assert files_in(cache) == [".part"]
    dataset = open_dataset(server.url, Cache(dir=str(cache)))
    dataset.open_shard(0)  # makes the copy; the next one finds it
    shard = dataset.open_shard(0)  # open, and so spared
    files.evict(folder, 0)
    assert files_in(cache) == [".mds"]
    assert shard.sample(3).tolist() == [12, 13, 14, 15]
    del shard
    files.evict(folder, 0)
    assert files_in(cache) == []


def test_who_made_a_copy_shares_it_while_it_is_open(tmp_path: Path) -> None:
    path = files.open_folder(str(tmp_path)) / f"{1:040x}-4.mds"

    def fill(part: BinaryIO) -> None:
        part.write(b"abcd")

    with files.make(path, 4, fill, wait=True, stop=threading.Event()), path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # raises if it is held for one alone
        assert other.read() == b"abcd"


def test_a_folder_that_mpt_did_not_make_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="not made by mpt, and not empty"):
        files.open_folder(str(tmp_path))
    with pytest.raises(DataError, match=r"data\.cache\.dir: .*thesis\.txt/shards cannot be used"):
        files.open_folder(f"{tmp_path}/shards/thesis.txt")


def bytes_below(folder: Path) -> int:
    """Bytes of the files in a cache that others write and delete meanwhile."""
    sizes: dict[int, int] = {}  # by inode: one that is renamed meanwhile is seen under both names
    for path in folder.rglob("*-*.*"):
        with suppress(FileNotFoundError):
            found = path.stat()
            sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def test_training_under_a_limit_reads_the_same_and_stays_below_it(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "set", 96, per_shard=1)  # six windows of 16 shards
    bytes_each = open_dataset(folder).shards[0].file_bytes
    limit = 40 * bytes_each
    most: list[int] = []
    with serving(folder) as server:
        results = []
        for path, keep in ((str(folder), None), (server.url, limit)):
            cache = Cache(dir=f"{tmp_path}/cache", limit_bytes=keep)
            data = Data(streams={"a": Stream(path=path)}, cache=cache)
            with loader_for(data, global_batch_size=4) as loader:
                rows = []
                for start in range(0, 192, 4):
                    rows.append(np.concatenate([m.tokens.numpy() for m in loader.next(start)]))
                    most.append(bytes_below(tmp_path / "cache"))
            results.append(rows)
    assert all(map(np.array_equal, *results))
    assert 0 < max(most) <= limit


def test_a_limit_below_two_windows_is_refused_with_the_number_to_set(
    tmp_path: Path, server: FaultyServer
) -> None:
    needed = sum(shard.file_bytes for shard in open_dataset(tmp_path / "set").shards)
    for limit, is_enough in ((needed, True), (needed - 1, False)):
        cache = Cache(dir=f"{tmp_path}/cache", limit_bytes=limit)
        data = Data(streams={"a": Stream(path=server.url)}, cache=cache)
        if is_enough:
            loader_for(data).close()
            continue
        with pytest.raises(DataError, match=rf"limit_bytes: {limit} is too little.* {needed};"):
            loader_for(data)


def test_who_need_not_wait_for_another_process_does_not(tmp_path: Path) -> None:
    path, stop = files.open_folder(str(tmp_path)) / "x.part", threading.Event()
    with files.exclusive(path, wait=True, stop=stop):
        with pytest.raises(files.BusyError), files.exclusive(path, wait=False, stop=stop):
            pass
        stop.set()
        with pytest.raises(files.BusyError), files.exclusive(path, wait=True, stop=stop):
            pass
