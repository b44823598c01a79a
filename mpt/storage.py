"""Files that are whole or absent, and one way to read local paths and fsspec URLs."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import json
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from mpt.errors import DataError, MptError

BLOCK_BYTES = 1 << 20
EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
"""What to install for each scheme of URL."""
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Between attempts to read a URL on; the real pause is drawn from zero to twice as long."""
LASTING = FileNotFoundError, PermissionError, ImportError, ValueError, TypeError
"""Of the errors of a URL, those that another attempt does not mend."""


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file that is there whole or not at all, also after a power cut.

    Args:
        path: where it shall be; its directory must exist. A file there is replaced.
        data: text is written as UTF-8.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable: a rename is lost in a power cut without this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file, which stays behind; the lock itself goes when its process does.

    Args:
        on_wait: called once if another holds it; then this waits until it is free.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Return the hex digest of a file, read in blocks; `algorithm` is one of hashlib's."""
    with path.open("rb") as file:
        return hash_stream(file, algorithm)


def hash_stream(file: BinaryIO, algorithm: str = "sha256") -> str:
    """Return the hex digest of what is still to be read of an open file."""
    digest = hashlib.new(algorithm)
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, *, limit_bytes: int, error: type[MptError] = DataError) -> Any:
    """Return what a JSON file holds.

    Args:
        limit_bytes: a larger file is refused before it is read.
        error: what to raise, for readers of checkpoints.

    Raises:
        error: missing, unreadable, too large, not UTF-8 or not JSON; names the file.
    """
    return parse_json(read_bounded(path, limit_bytes=limit_bytes, error=error), path, error=error)


def read_bounded(path: Path, *, limit_bytes: int, error: type[MptError] = DataError) -> bytes:
    """Return the bytes of a file that must not be larger than `limit_bytes`; as read_json."""
    try:
        with path.open("rb") as file:
            payload = file.read(limit_bytes + 1)
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file.") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}.") from cause
    if len(payload) > limit_bytes:
        raise error(f"{path}: larger than {limit_bytes} bytes; this is not what it should be.")
    return payload


def parse_json(payload: bytes, where: Path | str, *, error: type[MptError] = DataError) -> Any:
    """Return what the bytes of a JSON file hold; `error` names where they are from."""
    try:
        return json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: not a JSON file: {cause}.") from cause


def is_url(location: str) -> bool:
    """Tell an fsspec URL such as s3://bucket/key from a local path."""
    return "://" in location


def without_secrets(location: str) -> str:
    """Return a location fit for records and messages: no user, password or query in a URL."""
    if not is_url(location):
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_binary(location: str) -> BinaryIO:
    """Open a local path or fsspec URL to be read as bytes.

    What passes, such as a connection that breaks while a URL is read, is tried again.

    Raises:
        DataError: it cannot be opened; names the location and the cause.
    """
    try:
        if not is_url(location):
            return Path(location).open("rb")
        system, path = file_system(location)
        return cast(BinaryIO, io.BufferedReader(_Steady(system.open(path, "rb"), location)))
    except Exception as cause:  # each fsspec backend raises errors of its own
        raise _failed(location, "opened", cause) from cause


def file_system(location: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path within it."""
    from fsspec.core import url_to_fs

    found: tuple[Any, str] = url_to_fs(location)
    return found


def exists(location: str) -> bool:
    """Say whether there is something at a local path or fsspec URL.

    Raises:
        DataError: one cannot tell; names the location and the cause.
    """
    try:
        if not is_url(location):
            return os.path.exists(location)
        system, path = file_system(location)
        return bool(system.exists(path))
    except Exception as cause:  # each fsspec backend raises errors of its own
        raise _failed(location, "listed", cause) from cause


class _Steady(io.RawIOBase):
    """A file at a URL that is read on from the same byte after faults that pass."""

    def __init__(self, file: Any, location: str) -> None:
        self._file = file
        self._location = location

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        place = self.tell()
        pauses_s = iter(PAUSES_S)
        while True:
            try:
                data = self._file.read(len(buffer))
                break
            except Exception as cause:  # noqa: BLE001 - each backend raises errors of its own
                pause_s = next(pauses_s, None)
                if pause_s is None or isinstance(cause, LASTING) or not self.seekable():
                    raise OSError(_said(self._location, cause)) from None
            time.sleep(random.uniform(0.0, 2 * pause_s))
            self._file.seek(place)
        buffer[: len(data)] = data
        return len(data)


def _failed(location: str, verb: str, cause: Exception) -> DataError:
    """Return what to raise, with the extra to install where the library of a URL is missing."""
    where = without_secrets(location)
    scheme = urlsplit(location).scheme
    if isinstance(cause, ImportError) and scheme in EXTRAS:
        return DataError(
            f"{where}: {scheme}:// needs a library that is not here; "
            f"pip install 'mpt-train[{EXTRAS[scheme]}]'."
        )
    return DataError(f"{where}: cannot be {verb}: {_said(location, cause)}")


def _said(location: str, cause: Exception) -> str:
    """Return what an error says, or only its kind where its text may tell a secret of the URL."""
    if without_secrets(location) != location:
        return type(cause).__name__
    return str(cause) or type(cause).__name__


def list_files(location: str) -> list[str]:
    """Return the files at a location, sorted: itself, those below it, or those a glob matches.

    Hidden files and directories are left out; so are symbolic links that lead out of the
    directory, and what lies below linked directories.

    Raises:
        DataError: there is nothing there, or it cannot be listed.
    """
    found = _list_remote(location) if is_url(location) else _list_local(location)
    if not found:
        raise DataError(f"{without_secrets(location)}: no files there.")
    return found


def _list_local(location: str) -> list[str]:
    path = Path(location)
    if path.is_dir():
        return sorted(_walk(path))
    if path.is_file():
        return [location]
    matches = sorted(glob.glob(location, recursive=True))
    if not matches:
        raise DataError(f"{location}: no such file or directory.")
    found: set[str] = set()
    for match in matches:  # which may also be a link that leads nowhere, or a pipe
        if Path(match).is_dir():
            found.update(_walk(Path(match)))
        elif Path(match).is_file():
            found.add(match)
    return sorted(found)


def _walk(root: Path) -> Iterator[str]:
    inside = root.resolve()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and _is_within(path, inside):
                yield path.as_posix()


def _is_within(path: Path, directory: Path) -> bool:
    return not path.is_symlink() or path.resolve().is_relative_to(directory)


def _list_remote(location: str) -> list[str]:
    try:
        system, path = file_system(location)
        if glob.has_magic(path):
            return sorted(system.unstrip_protocol(name) for name in system.glob(path))
        if system.isfile(path):
            return [location]
        below = [(name, name[len(path) :].split("/")) for name in system.find(path)]
        return sorted(
            system.unstrip_protocol(name)
            for name, parts in below
            if not any(part.startswith(".") for part in parts)
        )
    except Exception as cause:  # each fsspec backend raises errors of its own
        raise _failed(location, "listed", cause) from cause
