"""Laws of remote data in use: ready before they are needed, and a recipe like any other."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mpt.data import fetch
from mpt.data.dataset import open_dataset
from mpt.data.prepare import prepare
from mpt.errors import DataError, UsageError
from mpt.recipe.data import Cache, Data, EvalData, Stream
from mpt.recipe.frozen import absolute, freeze
from mpt.storage import hash_file
from mpt.train.start import _changes, _check_data
from tests.data.cases import ABOUT, recipe_for, some_texts, write_texts
from tests.data.faults import (
    FaultyServer,
    cache_in,
    files_in,
    serving,
    small_dataset,
)
from tests.data.test_data_loader import loader_for

SHARD = "shard.00001.mds"
pytestmark = pytest.mark.usefixtures("quick")


def test_a_shard_is_there_before_it_is_needed(tmp_path: Path) -> None:
    small_dataset(tmp_path / "set", 64, per_shard=1)  # four windows of 16 shards
    data = Cache(dir=f"{tmp_path}/cache")
    with serving(tmp_path / "set") as server:
        streams = {"a": Stream(path=server.url)}
        with loader_for(Data(streams=streams, cache=data), global_batch_size=1) as loader:
            loader.next(0)
            assert loader._copies is not None
            loader._copies._threads.shutdown(wait=True)
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
        found, lineage, _ = _check_data(remote)
        assert lineage["only"]["source"] == str(texts)
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
    about = open_dataset(server.url, cache_in(tmp_path)).about
    assert about is not None
    assert about.beforehand() == ABOUT
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
    (tmp_path / "metrics.jsonl").touch()  # steps were taken
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
