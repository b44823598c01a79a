"""Laws of storage: a file is whole or absent, and what cannot be read is named."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mpt.errors import CheckpointError, DataError
from mpt.storage import atomic_write, hash_file, list_files, open_binary, read_json, without_secrets


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    atomic_write(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"

    def fail(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"new")
    assert path.read_text(encoding="utf-8") == "old é"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_hash_of_a_file_is_the_hash_of_its_bytes(tmp_path: Path) -> None:
    payload = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(payload)
    assert hash_file(tmp_path / "x") == hashlib.sha256(payload).hexdigest()
    assert hash_file(tmp_path / "x", "sha1") == hashlib.sha1(payload).hexdigest()


def test_json_that_cannot_be_had_is_an_error_of_the_kind_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match=r"x\.json: no such file"):
        read_json(path, limit_bytes=10)
    path.write_text('{"a": [1]}')
    assert read_json(path, limit_bytes=10) == {"a": [1]}
    with pytest.raises(CheckpointError, match="larger than 9 bytes"):
        read_json(path, limit_bytes=9, error=CheckpointError)
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path, limit_bytes=9)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for location in (f"{tmp_path}/none", "memory://none", "nonsense://none"):
        with pytest.raises(DataError, match="none: cannot be opened"):
            open_binary(location)


def test_an_empty_directory_has_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no files there"):
        list_files(str(tmp_path))


@pytest.mark.parametrize(
    ("location", "public"),
    [
        ("s3://bucket/key", "s3://bucket/key"),
        ("https://me:pw@host:1/x?token=secret#y", "https://host:1/x"),
        ("local/a@b?c", "local/a@b?c"),
    ],
)
def test_what_is_shown_of_a_location_holds_no_secret(location: str, public: str) -> None:
    assert without_secrets(location) == public


def test_a_glob_passes_over_links_that_lead_nowhere_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "c.txt")
    assert list_files(str(tmp_path / "*.txt")) == [str(tmp_path / "a.txt")]
    with pytest.raises(DataError, match="no files there"):
        list_files(str(tmp_path / "[bc].txt"))
