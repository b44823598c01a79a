"""Laws of remote shards: the same samples whatever the network does, or an error that says why."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mpt.data import fetch
from mpt.data.dataset import open_dataset, verify
from mpt.data.prepare import prepare
from mpt.errors import EXIT_DATA, DataError, UsageError
from mpt.recipe.data import Cache, Data, EvalData, Stream
from mpt.recipe.frozen import absolute, freeze
from mpt.storage import hash_file
from mpt.train.start import _changes, _check_data
from tests.data.cases import ABOUT, recipe_for, some_texts, write_texts
from tests.data.faults import (
    FaultyServer,
    compress,
    edit_index,
    files_in,
    serving,
    small_dataset,
)
from tests.data.test_data_loader import loader_for

SHARD = "shard.00001.mds"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    small_dataset(tmp_path / "set")
    with serving(tmp_path / "set") as state:
        yield state


def cache_in(tmp_path: Path, **settings: Any) -> Cache:
    return Cache(**{"dir": f"{tmp_path}/cache", "deadline_s": 20.0, **settings})


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


def test_a_shard_is_there_before_it_is_needed(tmp_path: Path) -> None:
    small_dataset(tmp_path / "set", 64, per_shard=1)  # four windows of 16 shards
    data = Cache(dir=f"{tmp_path}/cache")
    with serving(tmp_path / "set") as server:
        streams = {"a": Stream(path=server.url)}
        with loader_for(Data(streams=streams, cache=data), global_batch_size=1) as loader:
            loader.next(0)
            assert loader._copies is not None
            for fetching in list(loader._copies._asked.values()):
                fetching.result()
            assert files_in(tmp_path / "cache") == [".mds"] * 32
        assert len({name for name, _ in server.requests if name.endswith("mds")}) == 32
        assert len([name for name, _ in server.requests if name.endswith("mds")]) == 32


def test_a_closed_loader_leaves_no_thread_though_the_server_hangs(
    tmp_path: Path, server: FaultyServer
) -> None:
    before = set(threading.enumerate())
    data = Data(streams={"a": Stream(path=server.url)}, cache=cache_in(tmp_path, timeout_s=0.2))
    loader = loader_for(data)
    server.faults[SHARD] = ["hang!"]
    loader._thread.submit(loader._read, 0)
    server.stalled.wait()
    loader.close()
    assert not {t for t in set(threading.enumerate()) - before if t.name.startswith("mpt-")}


def test_a_recipe_of_remote_data_is_ready_without_a_shard_being_fetched(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", some_texts(60))
    made = prepare(recipe_for(tmp_path, texts))
    for section in ("train", "eval"):
        (tmp_path / "web").mkdir(exist_ok=True)
        (tmp_path / section).rename(tmp_path / "web" / section)
    with serving(tmp_path / "web") as server:
        local = recipe_for(tmp_path, texts)
        streams = {"only": Stream(path=f"{server.url}/train")}
        held_out = EvalData(path=f"{server.url}/eval")
        data = Data(streams=streams, eval=held_out, cache=cache_in(tmp_path))
        remote = replace(local, data=data, prepare=None)
        assert prepare(remote).streams["only"].shards == made.streams["only"].shards
        found = _check_data(remote)
        assert found["only"] == hash_file(tmp_path / "web" / "train" / "index.json")
        assert {name.partition("/")[2] for name, _ in server.requests} == {
            "index.json",
            "dataset.json",
        }
        other = replace(remote, model=replace(remote.model, max_seq_len=32))
        with pytest.raises(DataError, match=rf"{server.url}/train: samples of 16 tokens"):
            _check_data(other)


def test_how_a_dataset_came_to_be_is_read_over_the_network_where_it_is_told(
    tmp_path: Path, server: FaultyServer
) -> None:
    assert open_dataset(server.url, cache_in(tmp_path)).about == ABOUT
    (tmp_path / "set" / "dataset.json").unlink()
    assert open_dataset(server.url, cache_in(tmp_path)).about is None
    server.faults["dataset.json"] = ["403"]
    assert open_dataset(server.url, cache_in(tmp_path)).about is None
    (tmp_path / "set" / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match=rf"{server.url}/dataset\.json: tokenizer_sha256"):
        open_dataset(server.url, cache_in(tmp_path))


def test_a_closed_loader_does_not_wait_for_the_next_attempt(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 3600.0)
    data = Data(streams={"a": Stream(path=server.url)}, cache=cache_in(tmp_path, deadline_s=1e6))
    loader = loader_for(data)
    server.faults[SHARD] = ["503!"]
    reading = loader._thread.submit(loader._read, 0)
    while not server.asked(SHARD):
        server.stalled.wait(0.01)
    loader.close()
    assert reading.exception() is not None


def test_a_run_may_go_on_with_another_cache_but_not_with_another_order(tmp_path: Path) -> None:
    before = recipe_for(tmp_path, tmp_path / "texts")
    freeze(before, tmp_path / "recipe.yaml")
    cache = cache_in(tmp_path, limit_bytes=5)
    elsewhere = absolute(replace(before, data=replace(before.data, cache=cache)))
    assert set(_changes(elsewhere, tmp_path)) == {
        "data.cache.dir",
        "data.cache.limit_bytes",
        "data.cache.deadline_s",
    }
    reordered = absolute(replace(before, data=replace(before.data, shuffle=False)))
    with pytest.raises(UsageError, match=r"data\.shuffle"):
        _changes(reordered, tmp_path)
