"""One launch per run directory: the second is refused and told who has it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mpt.errors import UsageError
from mpt.rundir import LOCK

LOOK_S = 0.2
"""Longer than `holder` has the lock while it looks: a look must not refuse a launch."""


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; the kernel lets go of it when this process dies, however it dies.

    Raises:
        UsageError: if another process holds it, naming pid@host.
    """
    with (run_dir / LOCK).open("a+", encoding="utf-8") as file:
        if not (_take(file) or _take(file, after_s=LOOK_S)):
            file.seek(0)
            raise UsageError(
                f"{run_dir}: is being trained by {file.read().strip() or 'another process'}. "
                "Wait for it, stop it, or use another --run-dir."
            )
        file.truncate(0)
        file.write(f"{os.getpid()}@{socket.gethostname()}\n")
        file.flush()
        yield


def _take(file: TextIO, after_s: float = 0.0) -> bool:
    time.sleep(after_s)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(run_dir: Path) -> str | None:
    """Return pid@host of the launch that holds a run directory now, or None."""
    path = run_dir / LOCK
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None
