"""What a run writes down: metrics.jsonl and events.jsonl, one JSON object a line, no torch.

Trouble with the log is told once and never stops the run: a full disk must not end a training
that could go on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpt.rundir import EVENTS, METRICS


@dataclass
class Journal:
    """Appends to a run directory's two logs. Several processes may append at a time."""

    run_dir: Path
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
            # One write to a file opened for appending: lines of several processes never mix.
            descriptor = os.open(
                self.run_dir / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode=0o644
            )
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._complained:
                say(f"mpt: {self.run_dir / name}: cannot be written: {error}\n")
            self._complained = True


def say(text: str, end: str = "") -> None:
    """Write to the terminal, if there still is one: a closed one must not end a run."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def utc_now() -> str:
    """Return the time in ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
