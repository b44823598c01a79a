"""A log that is being written: what has been appended since the last look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tail:
    """All records of a JSONL file so far, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self.records: list[dict[str, Any]] = []

    def look(self) -> list[dict[str, Any]]:
        """Return the records that have come since the last call; half a line waits for its end."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                fresh = file.read()
        except FileNotFoundError:
            return []
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                found.append(record)
        self.records += found
        return found
