"""Laws of remote shards: the same samples whatever the network does, or an error that says why."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mpt.data.dataset import open_dataset, verify
from mpt.errors import EXIT_DATA, DataError
from mpt.recipe.data import Cache, Data, Stream
from tests.data.faults import (
    FaultyServer,
    cache_in,
    compress,
    edit_index,
    files_in,
    serving,
)
from tests.data.test_data_loader import loader_for

SHARD = "shard.00001.mds"
pytestmark = pytest.mark.usefixtures("quick")


def batches_of(path: Path | str, cache: Cache) -> list[torch.Tensor]:
    data = Data(streams={"a": Stream(path=str(path))}, cache=cache)
    with loader_for(data) as loader:
        return [m.tokens for start in range(0, 60, 10) for m in loader.next(start)]


def without_hashes(entry: dict[str, Any]) -> None:
    entry["raw_data"]["hashes"] = {}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["http", "memory", "file"])
def test_a_remote_stream_gives_the_microbatches_of_a_local_one(
    tmp_path: Path, server: FaultyServer, kind: str, zipped: bool
) -> None:
    wanted = batches_of(tmp_path / "set", cache_in(tmp_path))
    if zipped:
        compress(tmp_path / "set")
    url = {"http": server.url, "file": f"file://{tmp_path}/set", "memory": f"memory:/{tmp_path}"}[
        kind
    ]
    if kind == "memory":
        fsspec.filesystem("memory").put(f"{tmp_path}/set/", f"{tmp_path}/", recursive=True)
    found = batches_of(url, cache_in(tmp_path))
    assert all(map(torch.equal, found, wanted))
    assert files_in(tmp_path / "cache") == [".mds"] * 3


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        ["503", "500", "429", "408"],
        ["truncate", "truncate"],
        ["reset", "reset"],
        ["truncate", "no range"],
        ["truncate", "another range"],
        ["truncate", "503", "reset", "truncate"],
        ["longer"],
        ["shorter"],
        ["says less"],
        ["says more"],
    ],
    ids="+".join,
)
def test_what_passes_is_ridden_out(
    tmp_path: Path, server: FaultyServer, faults: list[str], hashes: bool
) -> None:
    if not hashes:
        edit_index(tmp_path / "set", without_hashes)
    server.faults[SHARD] = list(faults)
    wanted = batches_of(tmp_path / "set", cache_in(tmp_path))
    assert all(map(torch.equal, batches_of(server.url, cache_in(tmp_path)), wanted))
    # A server that ignores the range sends the whole file, and that is no fault.
    assert len(server.asked(SHARD)) == len(faults) + ("no range" not in faults)
    assert files_in(tmp_path / "cache") == [".mds"] * 3


@pytest.mark.parametrize("zipped", [False, True])
def test_a_corrupt_file_is_fetched_once_more_in_full(
    tmp_path: Path, server: FaultyServer, zipped: bool
) -> None:
    if zipped:
        compress(tmp_path / "set")
    name = SHARD + ".zstd" * zipped
    server.faults[name] = ["corrupt"]
    assert verify(open_dataset(server.url, cache_in(tmp_path))) == []
    assert server.asked(name) == [None, None]


def test_after_a_cut_only_the_rest_is_asked_for(tmp_path: Path, server: FaultyServer) -> None:
    server.faults[SHARD] = ["truncate", "truncate"]
    dataset = open_dataset(server.url, cache_in(tmp_path))
    dataset.open_shard(1)
    half = dataset.shards[1].file_bytes // 2
    rest = half + (dataset.shards[1].file_bytes - half) // 2
    assert server.asked(SHARD) == [None, f"bytes={half}-", f"bytes={rest}-"]


def test_other_bytes_than_those_asked_for_are_found_by_the_hash(
    tmp_path: Path, server: FaultyServer
) -> None:
    server.faults[SHARD] = ["truncate", "other bytes"]
    dataset = open_dataset(server.url, cache_in(tmp_path))
    dataset.open_shard(1)
    assert [wanted is None for wanted in server.asked(SHARD)] == [True, False, True]
    assert verify(dataset) == []


def test_a_file_that_changes_between_two_requests_is_fetched_from_the_start(
    tmp_path: Path, server: FaultyServer
) -> None:
    edit_index(tmp_path / "set", without_hashes)
    dataset = open_dataset(server.url, cache_in(tmp_path))
    server.faults[SHARD] = ["truncate", "corrupt", ""]
    dataset.open_shard(1)
    assert [wanted is None for wanted in server.asked(SHARD)] == [True, False, True]
    assert verify(dataset) == []


@pytest.mark.parametrize("hashes", [True, False])
def test_copies_without_a_hash_last_as_long_as_the_index_is_not_written_anew(
    tmp_path: Path, server: FaultyServer, hashes: bool
) -> None:
    if not hashes:
        edit_index(tmp_path / "set", without_hashes)
    for now in (1_000_000_000, 1_000_000_000, 1_000_000_060):
        os.utime(tmp_path / "set" / "index.json", (now, now))
        open_dataset(server.url, cache_in(tmp_path)).open_shard(1)
    assert len(server.asked(SHARD)) == (1 if hashes else 2)


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        ("403", "cannot be fetched: the server answers 403", 1),
        ("404", "cannot be fetched: the server answers 404", 1),
        ("410", "cannot be fetched: the server answers 410", 1),
        ("corrupt", r"corrupt shard: of shard\.00001\.mds, its sha256 is .* the index says", 2),
        ("endless", r"corrupt shard: it has more bytes than the \d+ it may", 2),
        ("longer", r"corrupt shard: it has \d+ bytes; the index says", 2),
        ("shorter", r"corrupt shard: it has \d+ bytes; the index says", 2),
        ("says less", r"corrupt shard: it has \d+ bytes; the index says", 2),
        ("says more", r"corrupt shard: it has \d+ bytes; the index says", 2),
    ],
)
def test_what_does_not_pass_ends_in_an_error_that_names_stream_and_shard(
    tmp_path: Path, server: FaultyServer, fault: str, words: str, requests: int
) -> None:
    server.faults[SHARD] = [fault + "!"]
    dataset = open_dataset(server.url, cache_in(tmp_path))
    with pytest.raises(DataError, match=rf"{server.url}/shard\.00001\.mds: {words}"):
        dataset.open_shard(1)
    assert len(server.asked(SHARD)) == requests
    data = Data(streams={"web": Stream(path=server.url)}, cache=cache_in(tmp_path))
    with loader_for(data) as loader, pytest.raises(DataError, match=r"^web: .*00001") as raised:
        loader.next(0)
    assert raised.value.exit_code == EXIT_DATA
    info = dataset.shards[1]
    assert not list((tmp_path / "cache").rglob(f"{dataset.store._key(info)}*.mds"))


@pytest.mark.parametrize("fault", ["503!", "truncate!", "reset!", "hang!"])
def test_a_server_that_stays_ill_is_given_up_at_the_deadline(
    tmp_path: Path, server: FaultyServer, fault: str
) -> None:
    cache = cache_in(tmp_path, deadline_s=0.3, timeout_s=0.1)
    dataset = open_dataset(server.url, cache)
    server.faults[SHARD] = [fault]
    with pytest.raises(DataError, match=r"00001\.mds: not fetched within 0\.3 s, in \d+ attempts"):
        dataset.open_shard(1)


def test_a_server_that_sends_too_slowly_is_given_up_though_it_is_never_silent(
    tmp_path: Path, server: FaultyServer
) -> None:
    dataset = open_dataset(server.url, cache_in(tmp_path, deadline_s=0.2))
    server.faults[SHARD] = ["drip!"]
    with pytest.raises(DataError, match=r"within 0\.2 s, in 1 attempts; .*: too slow: \d+ bytes"):
        dataset.open_shard(1)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with serving(tmp_path) as gone:
        url = gone.url
    with pytest.raises(DataError, match=rf"{url}/index\.json: not fetched within .* refused"):
        open_dataset(url, cache_in(tmp_path, deadline_s=0.1))


def test_an_index_that_is_not_there_too_large_or_none_is_refused(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"none/index\.json: cannot be fetched: .* 404"):
        open_dataset(f"{server.url}/none", cache_in(tmp_path))
    with pytest.raises(DataError, match=r"x/index\.json: cannot be fetched: FileNotFoundError"):
        open_dataset("memory://nowhere/x", cache_in(tmp_path))
    with pytest.raises(DataError, match=r"index\.json: cannot be fetched: ValueError.*[Pp]rotocol"):
        open_dataset("nosuch://x", cache_in(tmp_path))
    monkeypatch.setattr("mpt.data.descriptions.LIMIT_INDEX_BYTES", 50)
    with pytest.raises(DataError, match=r"index\.json: it has \d+ bytes; 50 is the most"):
        open_dataset(server.url, cache_in(tmp_path))


def test_login_and_signature_go_to_the_server_and_nowhere_else(
    tmp_path: Path, server: FaultyServer
) -> None:
    url = server.url.replace("://", "://me:s3cret@") + "?sig=s3cret"
    dataset = open_dataset(url, cache_in(tmp_path))
    assert {head["Authorization"] for head in server.headers} == {"Basic bWU6czNjcmV0"}
    server.faults[SHARD] = ["403"]
    with pytest.raises(DataError) as raised:
        dataset.open_shard(1)
    assert "s3cret" not in str(raised.value)
    assert "s3cret" not in dataset.location
    names = [str(path) for path in tmp_path.rglob("*")]
    assert not any("s3cret" in name for name in names)


def test_what_a_library_says_of_a_url_with_a_secret_is_not_repeated(tmp_path: Path) -> None:
    word = "s3" + "cret"  # in no line that a traceback shows
    with pytest.raises(DataError, match=r"memory://nowhere/x/index\.json: .*FileNot") as raised:
        open_dataset(f"memory://me:{word}@nowhere/x", cache_in(tmp_path))
    assert word not in "".join(traceback.format_exception(raised.value))
