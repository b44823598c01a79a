"""Streams and sources in a bucket, on a real S3-compatible server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from mpt.data.dataset import open_dataset, verify
from mpt.data.fingerprint import fingerprint
from mpt.data.source import documents, find_source
from mpt.errors import DataError
from mpt.recipe.data import Cache
from tests.data.cases import some_texts
from tests.data.faults import compress, small_dataset
from tests.data.tables import append, write_mds

pytestmark = pytest.mark.filterwarnings("default")  # those of boto are not ours


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty bucket on a server of this test's own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",  # for deltalake, which has a client of its own
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(name := f"bucket-{port}")  # moto's servers share their buckets
    yield name
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.parametrize("zipped", [False, True])
def test_a_stream_in_a_bucket_is_read_and_a_missing_shard_is_named(
    tmp_path: Path, bucket: str, zipped: bool
) -> None:
    small_dataset(tmp_path / "set")
    if zipped:
        compress(tmp_path / "set")
    s3fs.S3FileSystem().put(f"{tmp_path}/set/", f"{bucket}/set/", recursive=True)
    dataset = open_dataset(f"s3://{bucket}/set", Cache(dir=f"{tmp_path}/cache"))
    assert verify(dataset) == []
    assert dataset.open_shard(2).sample(0).tolist() == [56, 57, 58, 59]
    name = dataset.shards[1].stored.basename
    s3fs.S3FileSystem().rm(f"{bucket}/set/{name}")
    s3fs.S3FileSystem.clear_instance_cache()
    dataset.store.path_of(dataset.shards[1]).unlink()
    with pytest.raises(DataError, match=rf"s3://{bucket}/set/{name}: cannot be fetched: FileNot"):
        dataset.open_shard(1)


def read(url: str, cache: Cache) -> list[str]:
    return [d.text for d in documents(find_source(url, cache=cache), lambda *_: None)]


def test_every_kind_of_source_is_read_from_a_bucket(tmp_path: Path, bucket: str) -> None:
    texts, folder = some_texts(40), tmp_path / "all"
    folder.mkdir()
    (folder / "lines").mkdir()
    for name, part in (("a", texts[:25]), ("b", texts[25:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / "lines" / f"{name}.jsonl").write_text(lines)
    pq.write_table(pa.table({"text": texts}), folder / "x.parquet")
    write_mds(folder / "mds", [{"text": text.encode()} for text in texts], {"text": "str"})
    append(folder / "delta", [{"text": text} for text in texts])
    s3fs.S3FileSystem().put(f"{folder}/", f"{bucket}/all/", recursive=True)
    cache = Cache(dir=f"{tmp_path}/cache")
    for name in ("lines", "lines/*.jsonl", "x.parquet", "mds", "delta"):
        url = f"s3://{bucket}/all/{name}"
        assert read(url, cache) == texts, name
        seen = fingerprint(find_source(url, cache=cache))
        assert seen == fingerprint(find_source(url, cache=cache))
        assert seen.source_bytes
    with pytest.raises(DataError, match=rf"s3://{bucket}/nothing: no files there"):
        read(f"s3://{bucket}/nothing", cache)
