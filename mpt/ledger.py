"""The ledger of a run: which updates were left out and which data was passed over, and why.

    {"kind": "skipped", "step": 17, "from": 96, "to": 102, "why": "loss nan ..."}
        the update of step 17, on positions 96 to 101, was left out; the step counted
    {"kind": "rolled_back", "to_step": 20, "from": 120, "to": 150, "why": "..."}
        a run that comes to position 120 goes on at 150, and no step is counted

Every run obeys the ledger that lies in its directory. So a run that is given one from the start
ends with the same bits as the run that wrote it.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any

from mpt.errors import UsageError
from mpt.rundir import LEDGER
from mpt.storage import fsync_dir

LIMIT_BYTES = 1 << 26
"""Half a million lines: a file larger than this is not what it should be."""

_LARGEST = 1 << 62


@dataclass(frozen=True)
class Skipped:
    """An update that was left out."""

    step: int
    """The step that it would have ended; it counts."""
    start: int
    """Position in the data where the step begins."""
    stop: int
    why: str

    def to_json(self) -> dict[str, Any]:
        """Return the line."""
        return {
            "kind": "skipped",
            "step": self.step,
            "from": self.start,
            "to": self.stop,
            "why": self.why,
        }


@dataclass(frozen=True)
class RolledBack:
    """Data that is passed over, because updates on it were skipped again and again."""

    to_step: int
    """The last step before it."""
    start: int
    stop: int
    why: str

    def to_json(self) -> dict[str, Any]:
        """Return the line."""
        return {
            "kind": "rolled_back",
            "to_step": self.to_step,
            "from": self.start,
            "to": self.stop,
            "why": self.why,
        }


Entry = Skipped | RolledBack


@dataclass(frozen=True)
class Ledger:
    """What a ledger says, to be asked before each step."""

    entries: tuple[Entry, ...] = field(default=())

    @classmethod
    def read(cls, text: bytes, path: Path, global_batch_size: int) -> Ledger:
        """Return what the file at `path` says; it may come from a stranger.

        A last line that was cut off by a crash counts as not written.

        Raises:
            UsageError: naming file and line.
        """
        lines = text.split(b"\n")
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == len(lines):
                    break
                raise _unreadable(path, number, str(error)) from error
            try:
                entries.append(_entry(raw, global_batch_size))
            except ValueError as error:
                raise _unreadable(path, number, str(error)) from error
        return cls(tuple(entries))

    @property
    def n_rollbacks(self) -> int:
        """Rollbacks so far."""
        return sum(isinstance(entry, RolledBack) for entry in self.entries)

    def position(self, position: int) -> int:
        """Return the first position at or after this one that is not passed over."""
        place = bisect_right(self._starts, position) - 1
        return max(position, self._windows[place][1]) if place >= 0 else position

    def skips(self, step: int, position: int) -> bool:
        """Return whether the update of `step`, if it begins at `position`, is to be left out."""
        return (step, position) in self._skipped

    def went_back_from(self, position: int) -> bool:
        """Return whether a state at this position is of a branch that the run has given up.

        The batch before it was passed over, so no run that obeys the ledger comes there.
        """
        return position > 0 and self.position(position - 1) > position - 1

    @cached_property
    def _windows(self) -> list[tuple[int, int]]:
        """What is passed over: apart from each other, in order."""
        found = [(e.start, e.stop) for e in self.entries if isinstance(e, RolledBack)]
        return _merged(found)

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self._windows]

    @cached_property
    def _skipped(self) -> set[tuple[int, int]]:
        """Step and position of each line that no rollback has taken out of the run."""
        skipped = (e for e in self.entries if isinstance(e, Skipped))
        return {(e.step, e.start) for e in skipped if self.position(e.start) == e.start}


def read_ledger(run_dir: Path) -> bytes:
    """Return the bytes of a run's ledger, none if it has none.

    Raises:
        UsageError: if it cannot be read, or is too large to be one.
    """
    path = run_dir / LEDGER
    try:
        with path.open("rb") as file:
            text = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from error
    if len(text) > LIMIT_BYTES:
        raise UsageError(f"{path}: larger than {LIMIT_BYTES} bytes, so it is not a ledger.")
    return text


def append_entry(run_dir: Path, entry: Entry) -> None:
    """Add a line to a run's ledger; it is on disk when this returns.

    Raises:
        OSError: it could not be written, and the file is as it was.
    """
    path = run_dir / LEDGER
    line = json.dumps(entry.to_json()).encode() + b"\n"
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode=0o644)
    try:
        size = _mend_end(descriptor)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{path}: only a part of the line could be written")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if is_new:
        fsync_dir(run_dir)


def _mend_end(descriptor: int) -> int:
    """Drop a last line that a crash cut off, and return the size of what is left."""
    size = os.fstat(descriptor).st_size
    text = os.pread(descriptor, size, 0)
    last = text[text.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
    except (ValueError, RecursionError):
        size -= len(last)
        os.ftruncate(descriptor, size)
    else:
        if last:  # a whole line, whose end a person's editor has left out
            os.write(descriptor, b"\n")
            size += 1
    return size


def _entry(raw: object, global_batch_size: int) -> Entry:
    if not isinstance(raw, dict):
        raise ValueError("is not an object")
    keys = {
        "skipped": {"kind", "step", "from", "to", "why"},
        "rolled_back": {"kind", "to_step", "from", "to", "why"},
    }
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in keys:
        raise ValueError(f"kind is {short(kind)}; known are skipped and rolled_back")
    if set(raw) != keys[kind]:
        raise ValueError(f"a {kind} line has the keys {', '.join(sorted(keys[kind]))}")
    if not isinstance(raw["why"], str):
        raise ValueError("why is not a text")
    step = _count(raw, "to_step" if kind == "rolled_back" else "step")
    start, stop = _count(raw, "from"), _count(raw, "to")
    if start % global_batch_size or stop % global_batch_size or start >= stop:
        raise ValueError(
            f"from {start} to {stop} is not a number of whole batches of {global_batch_size} "
            "samples; the ledger of another train.global_batch_size has no meaning here"
        )
    if kind == "rolled_back":
        return RolledBack(step, start, stop, raw["why"])
    if stop - start != global_batch_size:
        raise ValueError(f"from {start} to {stop} is more than one step")
    return Skipped(step, start, stop, raw["why"])


def _count(raw: dict[str, Any], key: str) -> int:
    value = raw[key]
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{key} is {short(value)}, not a count")
    return value


def _unreadable(path: Path, number: int, why: str) -> UsageError:
    return UsageError(
        f"{path}:{number}: {why}. The ledger says which updates to leave out; restore the file "
        "from a copy, or remove it to train without."
    )


def _merged(windows: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same positions as windows that neither overlap nor touch, in order."""
    apart: list[tuple[int, int]] = []
    for start, stop in sorted(windows):
        if apart and start <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(apart[-1][1], stop))
        else:
            apart.append((start, stop))
    return apart
