"""Laws of the sources: every document once, in one order, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.data.source import Document, document, documents, find_source
from mpt.data.source.text import PIECE_BYTES
from mpt.errors import DataError


def read(where: Path | str, skipped: list[tuple[str, str]] | None = None) -> list[Document]:
    skipped = [] if skipped is None else skipped
    return list(documents(find_source(str(where)), lambda *what: skipped.append(what)))


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "x": 1}) + "\n" for text in texts).encode()


def test_a_directory_is_a_document_per_text_file_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    files = {"b/x.py": "py\r\n", "a.txt": "a", "c.md": "\ufeffmark", ".hidden.txt": "h"}
    files |= {"b/.git/x.txt": "g", "b/image.png": "png", "empty.txt": ""}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "more.jsonl").write_bytes(json_lines(["in json", "twice"]))
    skipped: list[tuple[str, str]] = []
    assert [document.text for document in read(tmp_path, skipped)] == [
        *("a", "py\r\n", "mark", "in json", "twice")
    ]
    root = tmp_path.as_posix()
    assert skipped == [
        (f"{root}/b/image.png", "not a text file"),
        (f"{root}/empty.txt", "empty"),
    ]


def test_links_that_lead_out_of_a_directory_are_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (inside / "real.txt").write_text("real")
    (inside / "link.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "own.txt").symlink_to(inside / "real.txt")
    assert [document.text for document in read(inside)] == ["real", "real"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_are_a_document_each_however_compressed(tmp_path: Path, suffix: str) -> None:
    texts = ["one", "two\nlines", "", "🙂"] * 500
    plain = json_lines(texts) + b"  \n" + json_lines(["last"])[:-1]
    half = len(plain) // 2
    compress = {
        "": lambda raw: raw,
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }[suffix]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(compress(plain[:half]) + compress(plain[half:]))  # two frames
    found = read(path)
    assert [document.text for document in found] == [t for t in [*texts, "last"] if t]
    assert found[1].name == f"{path}:2"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_truncated_compressed_file_is_an_error(tmp_path: Path, suffix: str, keep: float) -> None:
    plain = b'{"text": "x"}\n' * 50_000
    whole = gzip.compress(plain) if suffix == ".gz" else zstandard.compress(plain)
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=rf"x\.jsonl\{suffix}: cannot be read"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_an_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.txt{suffix}").write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", r"x\.jsonl:2: not a line of JSON"),
        (b"[" * 10_000, r"x\.jsonl:2: not a line of JSON"),
        (b"[1]", r"x\.jsonl:2: no text under the key 'text' \(seen: not an object\)"),
        (b'{"content": "a"}', r"x\.jsonl:2: no text under the key 'text' \(seen: content\)"),
        (b'{"text": 3}', r"x\.jsonl:2: no text under"),
        (b'{"text": "\\ud800"}', r"x\.jsonl:2: half a surrogate pair at character 0"),
        (b'{"text": "\xff"}', r"x\.jsonl:2: byte 10 is 0xff, which is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(DataError, match=words):
        read(tmp_path / "x.jsonl")


def test_a_null_in_json_lines_is_passed_over_as_one_in_a_table_is(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "ok"}\n{"text": null}\n{"text": "on"}\n')
    skipped: list[tuple[str, str]] = []
    found = documents(find_source(str(tmp_path)), lambda *what: skipped.append(what))
    assert [each.text for each in found] == ["ok", "on"]
    assert [why for _, why in skipped] == ["empty"]


def test_bytes_that_are_not_utf8_are_named_by_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"x\.txt: byte 3 is 0xe9, which is not UTF-8"):
        read(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"a\n\n" * PIECE_BYTES + b"caf\xe9")
    with pytest.raises(DataError, match=rf"x\.txt: byte {3 * PIECE_BYTES + 3} is 0xe9"):
        read(tmp_path / "x.txt")


def test_a_document_that_is_too_large_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "LIMIT_DOCUMENT_BYTES", 100)
    (tmp_path / "x.jsonl").write_bytes(json_lines(["a", "b" * 200]))
    with pytest.raises(DataError, match=r"x\.jsonl:2: one document of more than 100 bytes"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "y.txt").write_bytes(b"b" * 101)
    with pytest.raises(DataError, match=r"y\.txt: one document of more than 100 bytes"):
        read(tmp_path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000), max_size=9))
@settings(deadline=None)
def test_a_text_file_by_itself_is_cut_at_blank_lines_without_losing_a_character(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str]
) -> None:
    text = "\n\n".join(paragraphs).removeprefix("\ufeff")
    path = tmp_path_factory.getbasetemp() / "alone.txt"
    path.write_text(text, encoding="utf-8", newline="")
    found = [document.text for document in read(path)]
    assert "".join(found).encode() == text.encode() or "\n\ufeff" in text
    for piece in found[:-1]:
        assert len(piece.encode()) >= PIECE_BYTES - 3
        assert not piece.splitlines()[-1].strip()


def test_a_long_text_file_makes_documents_of_whole_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "word " * 150 + "\n" for number in range(60)]
    (tmp_path / "book.txt").write_text("\n".join(paragraphs))
    found = read(tmp_path / "book.txt")
    assert len(found) == 60 // 6 + (60 % 6 > 0)
    assert all(document.text.startswith(f"{6 * i} ") for i, document in enumerate(found))
    assert found[1].name == f"{tmp_path}/book.txt:13"


def test_sources_may_be_globs_and_urls(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(json_lines([name]))
    assert [document.text for document in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    remote = fsspec.filesystem("memory")
    remote.pipe("/texts/x.txt", b"remote")
    remote.pipe("/texts/.hidden/x.txt", b"hidden")
    remote.pipe("/texts/more/y.jsonl.gz", gzip.compress(json_lines(["lines"])))
    assert [document.text for document in read("memory://texts")] == ["lines", "remote"]
    assert [document.text for document in read("memory://texts/x.txt")] == ["remote"]
    assert [document.text for document in read("memory://texts/*.txt")] == ["remote"]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nowhere", "nowhere: no such file or directory"),
        ("memory://nowhere", "memory://nowhere: no files there"),
        ("nonsense://me:pw@host/x", "nonsense://host/x/.*: cannot be listed"),
    ],
)
def test_a_source_that_is_not_there_is_named_without_its_password(where: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(where)


def test_the_standard_library_comes_without_its_tests_and_installed_packages() -> None:
    names = [document.name for document in read("python-stdlib")]
    assert names == sorted(names)
    assert {"asyncio/base_events.py", "json/decoder.py", "os.py"} < set(names)
    assert not [name for name in names if "site-packages" in name or "idle_test/" in name]


def test_a_module_of_the_standard_library_that_does_not_decode_is_counted_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (tmp_path / "bad.py").write_bytes(b"# coding: nonsense\n")
    (tmp_path / "worse.py").write_bytes(b"# \xff\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    skipped: list[tuple[str, str]] = []
    found = read("python-stdlib", skipped)
    assert [document.text for document in found] == ["x = 1\n", "# coding: latin-1\n# é\n"]
    assert [name for name, _ in skipped] == ["bad.py", "worse.py"]
