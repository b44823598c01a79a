"""What a run writes down: metrics.jsonl and events.jsonl, one JSON object a line, no torch.

Trouble with the log is told once and never stops the run: a full disk must not end a training
that could go on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from mpt.rundir import EVENTS, METRICS


@dataclass
class Journal:
    """Appends to a run directory's two logs. Several processes may append at a time."""

    run_dir: Path
    complain: Callable[[str], None] = lambda why: say(f"mpt: {why}\n")
    """Told once, when something could not be written."""
    _complained: bool = field(default=False, repr=False)

    def metrics(self, **record: Any) -> None:
        """Append one line to metrics.jsonl."""
        self._append(METRICS, record)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        self._append(EVENTS, {"event": kind, **fields})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        line = json.dumps({**record, "time": utc_now()}, default=str) + "\n"
        try:
            descriptor = os.open(
                self.run_dir / name, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode=0o644
            )
            try:
                _append_line(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._complained:
                self.complain(f"{self.run_dir / name}: cannot be written: {error.strerror}.")
            self._complained = True


@dataclass(frozen=True)
class Unfailing:
    """A text stream that is written to as far as it goes: a full disk or a closed terminal must
    not end a library that prints, and the run with it."""

    stream: TextIO

    def write(self, text: str) -> int:
        """Write, or lose what cannot be written."""
        with suppress(OSError, ValueError):  # the latter: it was closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or lose it."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def say(text: str, end: str = "") -> None:
    """Write to the terminal, if there still is one: a closed one must not end a run."""
    if sys.stderr is not None:  # as after `2>&-`; print would take stdout instead
        print(text, end=end, file=Unfailing(sys.stderr), flush=True)


def utc_now() -> str:
    """Return the time in ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _append_line(descriptor: int, line: bytes) -> None:
    """Append in one write, so that lines of several processes never mix.

    A line that was cut off, as by a full disk or a kill, is ended first: it is lost, and must not
    take this one with it.

    Raises:
        OSError: it could not be written, or not all of it.
    """
    with suppress(OSError):  # on NFS two machines would write over each other
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    if (written := os.write(descriptor, line)) < len(line):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, after {written} bytes")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log; a line cut off by a crash is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
