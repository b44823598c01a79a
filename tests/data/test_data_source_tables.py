"""Laws of sources that are tables: parquet, saved Arrow, MDS: the rows, and what is wrong named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpt.data.dataset import open_dataset
from mpt.data.plan import Progress
from mpt.data.prepare import prepare
from mpt.data.source import Document, Meter, document, documents, find_source, parquet
from mpt.errors import DataError
from tests.data.cases import files_of, recipe_for, some_texts, write_dataset, write_tokenizer
from tests.data.faults import compress, counting
from tests.data.tables import append, write_mds

TEXTS = ["one", "two\nlines", "\ufeffmark", "", "🙂 été", None, "last"]


def read(
    where: Path | str, text_key: str = "text", skipped: list[tuple[str, str]] | None = None
) -> list[Document]:
    skipped = [] if skipped is None else skipped
    return list(documents(find_source(str(where), text_key), lambda *w: skipped.append(w)))


def write_parquet(path: Path, texts: list[str | None], **options: object) -> Path:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, **options)
    return path


def write_saved(folder: Path, texts: list[str | None], n_files: int = 2) -> Path:
    """Write what `datasets.Dataset.save_to_disk` does, as far as a reader needs it."""
    folder.mkdir()
    names = [f"data-{i:05d}-of-{n_files:05d}.arrow" for i in range(n_files)]
    size = -(-len(texts) // n_files)
    for i, name in enumerate(names):
        part = pa.table({"text": pa.array(texts[i * size : (i + 1) * size], pa.string())})
        with pa.ipc.new_stream(f"{folder}/{name}", part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_texts_as_mds(folder: Path, texts: list[str | None]) -> Path:
    rows = [{"text": (text or "").encode(), "n": b"12345678"} for text in texts]
    return write_mds(folder, rows, {"text": "str", "n": "int"})


def write_delta(folder: Path, texts: list[str | None]) -> Path:
    append(folder, [{"text": text, "n": 1} for text in texts])
    return folder


KINDS: dict[str, Callable[[Path, list[str | None]], Path]] = {
    "x.parquet": write_parquet,
    "saved": write_saved,
    "mds": write_texts_as_mds,
    "delta": write_delta,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_texts_in_their_order_and_says_what_it_passes_over(
    tmp_path: Path, kind: str
) -> None:
    skipped: list[tuple[str, str]] = []
    found = read(KINDS[kind](tmp_path / kind, TEXTS), skipped=skipped)
    assert [document.text for document in found] == [text for text in TEXTS if text]
    null = "empty" if kind == "mds" else "null"  # MDS knows no null
    assert [why for _, why in skipped] == ["empty", null]
    assert all(str(tmp_path) in name for name, _ in skipped)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_prepares_to_the_same_bytes_by_any_number_of_workers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 4000)
    texts = some_texts(60)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    KINDS[kind](tmp_path / kind, list(texts))
    read_bytes: list[Progress] = []
    for out, source, workers in (("a", "lines.jsonl", 1), ("b", kind, 1), ("c", kind, 2)):
        write_tokenizer(tmp_path / out / "tokenizer.model")
        recipe = recipe_for(tmp_path / out, tmp_path / source)
        done = prepare(recipe, workers=workers, progress=read_bytes.append)
    shards = [
        {name: data for name, data in files_of(tmp_path / out).items() if name[-4:] == ".mds"}
        for out in "abc"
    ]
    assert shards[0] == shards[1] == shards[2]
    assert files_of(tmp_path / "b") == files_of(tmp_path / "c")
    last = read_bytes[-1]
    assert last.read_bytes == last.source_bytes
    about = done.streams["only"].about
    assert about is not None
    plain = open_dataset(tmp_path / "a" / "train").about
    assert plain is not None
    assert about.content_sha256 == plain.content_sha256
    assert about.source_version == "0" if kind == "delta" else len(about.source_version) == 64


def test_parquet_comes_from_directories_globs_and_urls(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a1", "a2"])
    write_parquet(tmp_path / "b.parquet", ["b"])
    (tmp_path / "_SUCCESS").write_text("")
    assert [d.text for d in read(tmp_path)] == ["a1", "a2", "b"]
    assert [d.text for d in read(tmp_path / "*.parquet")] == ["a1", "a2", "b"]
    remote = fsspec.filesystem("memory")
    remote.pipe("/tables/x.parquet", (tmp_path / "a.parquet").read_bytes())
    found = read("memory://tables")
    assert [d.text for d in found] == ["a1", "a2"]
    assert found[1].name.endswith("tables/x.parquet:2")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_a_column_of_any_kind_of_text_is_read(tmp_path: Path, kind: str) -> None:
    types = {
        "string": pa.string(),
        "large_string": pa.large_string(),
        "string_view": pa.string_view(),
        "binary": pa.binary(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }
    texts = ["a", "é", "a", None, "b"] * 9
    values = [t.encode() if t and kind == "binary" else t for t in texts]
    table = pa.table({"text": pa.array(values, types[kind])})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    assert [d.text for d in read(tmp_path / "x.parquet")] == [t for t in texts if t]


def test_a_column_that_is_not_there_or_no_text_is_named_with_those_that_are(tmp_path: Path) -> None:
    for kind, write in KINDS.items():
        path = write(tmp_path / kind, ["a"])
        with pytest.raises(DataError, match=r"no .*column 'content'.* \(there are: .*text"):
            read(path, "content")
    with pytest.raises(DataError, match=r"'id' holds int64, not text; .* that does: text"):
        read(tmp_path / "x.parquet", "id")
    with pytest.raises(DataError, match=r"'n' holds int64, not text"):
        read(tmp_path / "delta", "n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_not_utf8_is_named_by_row(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path / kind, ["sound", "QQQQ-caf", "x"])
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.suffix in (".parquet", ".arrow", ".mds"):
            file.write_bytes(file.read_bytes().replace(b"QQQQ-caf", b"QQQQ-ca\xe9"))
    with pytest.raises(DataError, match=r":2: byte 7 is 0xe9, which is not UTF-8"):
        read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_giant_row_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "LIMIT_DOCUMENT_BYTES", 1000)
    path = KINDS[kind](tmp_path / kind, ["a", "b", "c" * 1001, *"defg"])
    with pytest.raises(DataError, match=r"(:3|arrow:3): one document of more than 1000 bytes"):
        read(path)


def test_a_row_group_of_giant_rows_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", ["a" * 5000, "b" * 5000], use_dictionary=False)
    monkeypatch.setattr(document, "LIMIT_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(parquet, "documents_of", None)
    with pytest.raises(DataError, match=r"x\.parquet:1 to 2: one document of more than 1000"):
        read(path)


def test_rows_that_share_a_giant_value_are_decoded_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", ["a" * 100_000] * 2000)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1 << 20)
    before = pa.total_allocated_bytes()
    with path.open("rb") as raw:
        sizes = [
            (batch.num_rows, pa.total_allocated_bytes() - before)
            for _, batch in parquet.batches(parquet.open_file(raw, "x"), "x", "text", ["text"])
        ]
    assert sum(rows for rows, _ in sizes) == 2000
    assert max(allocated for _, allocated in sizes) < 4 << 20


@pytest.mark.parametrize("kind", ["x.parquet", "saved", "mds"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, kind: str, keep: float) -> None:
    path = KINDS[kind](tmp_path / kind, list(some_texts(20)))
    file = path if path.is_file() else sorted(path.glob("*0000*"))[-1]
    payload = file.read_bytes()
    file.write_bytes(payload[: int(len(payload) * keep)])
    with pytest.raises(DataError, match=file.name.replace(".", r"\.")):
        read(path)


def test_a_saved_stream_that_ends_between_two_batches_is_not_taken_for_whole(
    tmp_path: Path,
) -> None:
    folder = write_saved(tmp_path / "saved", ["a", "b", "c", "d"], n_files=1)
    file = folder / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    with pa.OSFile(str(file)) as stream:  # pyarrow itself does not mind
        assert pa.ipc.open_stream(stream).read_all().num_rows == 4
    with pytest.raises(DataError, match="not a whole stream"):
        read(folder)


def test_a_saved_dataset_may_be_remote_and_its_files_may_not_be_elsewhere(tmp_path: Path) -> None:
    folder = write_saved(tmp_path / "saved", ["a", "b", "c"])
    fsspec.filesystem("memory").put(str(folder), "/hf/saved", recursive=True)
    assert [d.text for d in read("memory://hf/saved")] == ["a", "b", "c"]
    for name in ("../x.arrow", "/etc/passwd", "..", ""):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="is not the name of a file beside it"):
            read(folder)


def test_what_datasets_saves_is_read_as_it_reads_it_itself(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    texts = some_texts(50)
    plain = datasets.Dataset.from_dict({"text": texts, "n": list(range(50))})
    shuffled = plain.shuffle(seed=3).filter(lambda row: row["n"] % 3 > 0)
    datasets.DatasetDict({"train": shuffled, "test": plain}).save_to_disk(
        str(tmp_path / "d"), num_shards={"train": 4, "test": 1}
    )
    with pytest.raises(DataError, match="several splits; name the folder of one"):
        read(tmp_path / "d")
    back = datasets.load_from_disk(str(tmp_path / "d"))
    for split in ("train", "test"):
        assert [d.text for d in read(tmp_path / "d" / split)] == list(back[split]["text"])


@pytest.mark.parametrize("encoding", ["str", "bytes", "json"])
@pytest.mark.parametrize("zipped", [False, True])
def test_mds_of_every_encoding_of_text_is_read(tmp_path: Path, encoding: str, zipped: bool) -> None:
    texts = [text for text in TEXTS if text]
    encode = (lambda t: json.dumps(t).encode()) if encoding == "json" else str.encode
    rows = [{"a": b"x" * i, "text": encode(t), "z": b""} for i, t in enumerate(texts)]
    folder = write_mds(tmp_path / "mds", rows, {"a": "bytes", "text": encoding, "z": "str"})
    if zipped:
        compress(folder, keep_hashes=False)
    recipe = recipe_for(tmp_path, folder).data.cache
    source = find_source(str(folder), cache=recipe)
    meter = Meter()
    assert [d.text for d in documents(source, lambda *_: None, meter)] == texts
    stored = [*folder.glob("*.mds*")]
    assert meter.read_bytes == sum(file.stat().st_size for file in stored)


def test_a_dataset_of_tokens_is_to_be_named_as_a_stream(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tokens", counting(20))
    with pytest.raises(DataError, match=r"tokenized already .* name it in data\.streams and drop"):
        read(tmp_path / "tokens")


def test_a_json_column_of_mds_that_is_no_text_is_named_by_row(tmp_path: Path) -> None:
    for payload, words in ((b"[1]", "a JSON list"), (b"{", "not JSON"), (b'"\\ud800"', "half a")):
        shutil.rmtree(tmp_path / "mds", ignore_errors=True)
        rows = [{"text": b'"a"'}, {"text": payload}]
        folder = write_mds(tmp_path / "mds", rows, {"text": "json"})
        with pytest.raises(DataError, match=rf"shard\.00000\.mds:2: {words}"):
            read(folder)


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [
        ("x.parquet", "pyarrow", "parquet"),
        ("saved", "pyarrow", "parquet"),
        ("delta", "deltalake", "delta"),
        ("delta", "pyarrow", "delta"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, extra: str
) -> None:
    path = KINDS[kind](tmp_path / kind, ["a"])
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"pip install 'mpt-train\[{extra}\]'"):
        read(path)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gs")])
def test_a_missing_file_system_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str
) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    registry = sys.modules["fsspec.registry"]._registry  # classes that were imported before
    monkeypatch.delitem(registry, scheme, raising=False)
    with pytest.raises(DataError, match=rf"pip install 'mpt-train\[{extra}\]'"):
        read(f"{scheme}://bucket/x.jsonl")


@pytest.mark.parametrize("kind", ["saved", "delta"])
def test_a_file_that_is_a_link_out_of_its_dataset_is_refused(tmp_path: Path, kind: str) -> None:
    folder = KINDS[kind](tmp_path / kind, ["a"])
    file = next(path for path in folder.iterdir() if path.suffix in (".arrow", ".parquet"))
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="a link that leads out of the dataset"):
        read(folder)
