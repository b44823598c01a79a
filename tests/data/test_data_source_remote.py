"""Laws of sources that are elsewhere: the same documents whatever the network does, or an error."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from mpt import storage
from mpt.data.fingerprint import fingerprint
from mpt.data.prepare import prepare
from mpt.data.source import documents, find_source, web
from mpt.data.source.web import WebFile
from mpt.errors import DataError
from tests.data.cases import files_of, recipe_for, some_texts, write_tokenizer
from tests.data.faults import FaultyServer, cache_in, serving
from tests.data.tables import write_mds

TEXTS = [text * 30 for text in some_texts(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """Serves texts in several formats."""
    monkeypatch.setattr(web, "PAUSES_S", (0.001,) * 3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "x.jsonl").write_bytes(LINES)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(LINES))
    pq.write_table(pa.table({"text": TEXTS}), folder / "x.parquet", row_group_size=50)
    with serving(folder) as state:
        yield state


def read(url: str, **options: Any) -> list[str]:
    return [d.text for d in documents(find_source(url, **options), lambda *_: None)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.jsonl?sig=a.b"])
@pytest.mark.parametrize("fault", ["", "truncate", "reset", "503", "drop"])
def test_a_file_on_a_web_server_is_read_whole_whatever_breaks(
    site: FaultyServer, name: str, fault: str
) -> None:
    site.faults[name.partition("?")[0]] = ["truncate", "", "reset"] if fault == "drop" else [fault]
    assert read(f"{site.url}/{name}") == TEXTS


def test_a_server_without_parts_of_files_is_read_from_the_start_again(site: FaultyServer) -> None:
    site.faults["x.jsonl"] = ["truncate", "no range"]
    assert read(f"{site.url}/x.jsonl") == TEXTS
    site.faults["x.parquet"] = ["no range!"]
    assert read(f"{site.url}/x.parquet") == TEXTS


def test_a_file_that_changes_while_it_is_read_is_an_error(site: FaultyServer) -> None:
    site.faults["x.jsonl"] = ["truncate", "corrupt"]  # of another version, so with another ETag
    with pytest.raises(DataError, match="was changed while it was read; run this again"):
        read(f"{site.url}/x.jsonl")


@pytest.mark.parametrize(
    ("fault", "words"),
    [("404", "answers 404"), ("403", "answers 403"), ("503!", "answers 503"), ("truncate!", "cut")],
)
def test_a_file_that_cannot_be_had_is_an_error_that_names_it_without_its_secrets(
    site: FaultyServer, fault: str, words: str
) -> None:
    site.faults["x.jsonl"] = [fault] if fault != "truncate!" else ["truncate", "503!"]
    url = site.url.replace("://", "://me:secret@") + "/x.jsonl?token=secret"
    with pytest.raises(DataError, match=rf"{site.url}/x\.jsonl: cannot be") as caught:
        read(url)
    assert words in str(caught.value) or fault == "truncate!"
    assert "secret" not in str(caught.value)


def test_any_part_of_a_file_on_a_web_server_is_that_of_the_file(site: FaultyServer) -> None:
    with io.BufferedReader(WebFile(f"{site.url}/x.jsonl")) as file:
        for start, size in ((0, 10), (5, 3), (len(LINES) - 7, 99), (0, 1), (2 << 16, 40_000)):
            file.seek(start)
            assert file.tell() == start
            assert file.read(size) == LINES[start : start + size]
        assert file.seek(0, 2) == len(LINES)
        assert file.read(1) == b""


def test_a_web_files_version_is_in_the_fingerprint(site: FaultyServer) -> None:
    source = find_source(f"{site.url}/x.jsonl")
    before = fingerprint(source)
    assert before.source_bytes == len(LINES)
    assert fingerprint(source) == before
    (site.directory / "x.jsonl").write_bytes(LINES[::-1])
    assert fingerprint(source).digest != before.digest


def test_mds_on_a_web_server_is_fetched_into_the_cache(site: FaultyServer, tmp_path: Path) -> None:
    rows = [{"text": text.encode()} for text in TEXTS[:20]]
    write_mds(site.directory / "mds", rows, {"text": "str"}, per_shard=7)
    for file in (site.directory / "mds").iterdir():  # the server knows no folders
        file.rename(site.directory / file.name)
    site.faults["shard.00001.mds"] = ["reset"]
    cache = cache_in(tmp_path)
    assert read(site.url, cache=cache) == TEXTS[:20]
    assert fingerprint(find_source(site.url, cache=cache)).source_bytes is not None


def test_what_is_prepared_from_afar_is_what_is_prepared_from_here(
    site: FaultyServer, tmp_path: Path
) -> None:
    for name, source in (("here", f"{site.directory}/x.jsonl"), ("far", f"{site.url}/x.jsonl")):
        write_tokenizer(tmp_path / name / "tokenizer.model")
        recipe = recipe_for(tmp_path / name, source, shard_bytes=1 << 20)
        cached = replace(recipe.data, cache=cache_in(tmp_path))
        prepare(replace(recipe, data=cached), workers=1)
    far, here = files_of(tmp_path / "far"), files_of(tmp_path / "here")
    assert {n: b for n, b in far.items() if "dataset.json" not in n} == {
        name: b for name, b in here.items() if "dataset.json" not in name
    }


class _Flaky(MemoryFileSystem):
    """A file system whose files fail each second time they are read."""

    protocol = ("flaky", "memory")
    fails = 1

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        return _FlakyFile(self, path, file.getvalue()) if mode == "rb" else file


class _FlakyFile(MemoryFile):
    reads = 0

    def read(self, size: int = -1) -> bytes:
        type(self).reads += 1
        if type(self).reads % 3 < _Flaky.fails:
            super().read(size // 2)  # and the place is lost
            raise RuntimeError("the connection broke")
        return bytes(super().read(size))


def test_a_file_of_any_backend_is_read_on_after_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.001,) * 3)
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    fsspec.filesystem("memory").pipe("/far/x.jsonl", LINES)
    monkeypatch.setattr(_Flaky, "fails", 1)
    assert read("flaky://far/x.jsonl") == TEXTS
    monkeypatch.setattr(_Flaky, "fails", 3)
    with pytest.raises(DataError, match=r"far/x\.jsonl: cannot be read: the connection broke"):
        read("flaky://far/x.jsonl")
