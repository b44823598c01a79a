"""A directory of shards that were fetched or decompressed: whole files, shared by processes.

`DIR/shards/KEY-BYTES.mds` is whole and verified. `.part` and `.zst` are being made, or were when
their process died. Whoever makes or maps a file holds a lock on it, which goes with the process.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mpt.errors import DataError
from mpt.storage import fsync_dir

FOLDER = "shards"
TAG = "CACHEDIR.TAG"
TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Shards that mpt keeps.\n"
"""Tells programs that make backups to pass over it: https://bford.info/cachedir/."""
OURS = re.compile(r"[0-9a-f]{40}-(\d{1,10})\.(mds|part|zst)", re.ASCII)
POLL_S = 0.05
"""Between two looks whether another process is done with a file."""


class BusyError(Exception):
    """Another process makes this file, and we are not to wait for it."""


def open_folder(directory: str) -> Path:
    """Return the folder for shards within a cache directory, made if need be.

    Raises:
        DataError: a folder is there that is not of our making, or none can be made.
    """
    folder = Path(directory).expanduser() / FOLDER
    tag = folder / TAG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = not tag.is_file() and any(folder.iterdir())
        if foreign and not tag.is_file():  # looked at twice: another process may be making it
            raise DataError(
                f"{folder}: not made by mpt, and not empty; set another data.cache.dir."
            )
        with suppress(FileExistsError), tag.open("x") as file:
            file.write(TAG_TEXT)
    except OSError as error:
        raise DataError(
            f"data.cache.dir: {folder} cannot be used: {error.strerror}; set another one."
        ) from error
    return folder


def open_whole(path: Path, size: int) -> BinaryIO | None:
    """Return a whole file, open and safe from eviction until it is closed; None if not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    file = os.fdopen(descriptor, "rb")
    try:
        fcntl.flock(file, fcntl.LOCK_SH)  # for a moment, who evicts or publishes may hold it
        if os.fstat(descriptor).st_size != size:
            file.close()
            return None
        with suppress(FileNotFoundError):
            os.utime(path)  # eviction takes the oldest
    except BaseException:
        file.close()
        raise
    return file


def make(
    path: Path, size: int, fill: Callable[[BinaryIO], None], *, wait: bool, stop: threading.Event
) -> BinaryIO:
    """Return a whole file as open_whole does, made by `fill` unless another process made it.

    Args:
        fill: writes and verifies; is given what an interrupted call left.
        wait: for a process that is making it; else BusyError.
        stop: ends the waiting, with BusyError.
    """
    part = path.with_suffix(".part")
    with exclusive(part, wait=wait, stop=stop) as file:
        if (whole := open_whole(path, size)) is not None:
            part.unlink()
            return whole
        fill(file)
        file.flush()
        os.fsync(file.fileno())
        part.rename(path)
        fsync_dir(path.parent)
        # The same open file goes on, so there is no moment at which it could be evicted.
        whole = os.fdopen(os.dup(file.fileno()), "rb")
    fcntl.flock(whole, fcntl.LOCK_SH)
    return whole


@contextmanager
def exclusive(path: Path, *, wait: bool, stop: threading.Event) -> Iterator[BinaryIO]:
    """Open a file to be written, made if need be, that no other process writes or deletes."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "r+b") as file:
            while not _locked(file):
                if not wait or stop.wait(POLL_S):
                    raise BusyError
            if _is_at(path, file):
                yield file
                return
        # While we waited it was published under another name, or deleted. Look again.


def evict(folder: Path, limit_bytes: int) -> None:
    """Delete the files used longest ago until the rest fits, but none that is in use.

    What is in use may be more than the limit; then that is what stays. Files count with the
    bytes that they will have. What does not have the name of one of our files is left alone.
    """
    with (folder / TAG).open("rb") as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        found = sorted(_ours(folder))
        excess = sum(size for _, size, _ in found) - limit_bytes
        for _, size, path in found:
            if excess <= 0:
                return
            if _delete_unused(path):
                excess -= size


def _ours(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield when each of our files was last used, its bytes, and its path."""
    with os.scandir(folder) as entries:
        for entry in entries:
            match = OURS.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                yield status.st_mtime_ns, max(int(match[1]), status.st_size), Path(entry.path)


def _delete_unused(path: Path) -> bool:
    """Delete a file that no process holds, and say whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    with os.fdopen(descriptor, "rb") as file:
        if not _locked(file):
            return False
        path.unlink(missing_ok=True)
        return True


def _locked(file: BinaryIO) -> bool:
    """Lock a file for us alone, if nobody holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Say whether a path leads to this open file."""
    try:
        there, here = path.stat(follow_symlinks=False), os.fstat(file.fileno())
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
