"""Real disks that are small, full or read-only, where this machine lets a test mount them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PAGE_BYTES = 4096


@contextmanager
def small_disk(place: Path, kib: int = 1024) -> Iterator[Path]:
    """Mount a disk of its own, of so many KiB, at a directory; skip the test if that is denied."""
    place.mkdir(parents=True, exist_ok=True)
    done = _run("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place))
    if done.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        _run("umount", "--lazy", str(place))


def fill_up(place: Path, free_pages: int = 0) -> Path:
    """Fill a disk but for so many pages; return the file that does it."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(PAGE_BYTES))
        file.truncate(file.tell() - free_pages * PAGE_BYTES)
    return filler


def make_read_only(place: Path, read_only: bool = True) -> bool:
    """Let nobody write to a disk, or let them again; False if a file is open for writing."""
    return _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(place)).returncode == 0


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)
