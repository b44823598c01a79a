"""What supervisor and workers tell each other through files: attempts, logs, last words."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mpt.log import read_lines
from mpt.rundir import EVENTS, LOGS

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that are passed on to the workers, which then save and end."""

ATTEMPT = "MPT_ATTEMPT"
"""Environment variable: the number of the attempt that a worker belongs to."""

INJECT = "MPT_INJECT"
"""Environment variable: faults that ranks are to make themselves, as JSON (mpt/train/inject.py)."""

MEMORY_FD = "MPT_MEMORY_FD"
"""Environment variable: descriptor of the memory where a rank keeps copies of its state."""

STORE_FD = "MPT_STORE_FD"
"""Environment variable, rank 0's: descriptor of the socket that the attempt's store listens on."""

SUPERVISOR = "MPT_SUPERVISOR_PID"
"""Environment variable: the process that a worker must not outlive."""

_ATTEMPT_NAME = re.compile(r"attempt-(\d+)")


@dataclass(frozen=True)
class LastWords:
    """How a worker ended, as far as it could still say; a good end is said too."""

    rank: int
    exit_code: int
    error: str
    """Class of the exception."""
    message: str
    step: int = 0
    """Steps finished."""
    time: float = 0.0
    """`time.time()`: of several ranks that failed, the first one is the cause."""


def next_attempt(run_dir: Path) -> int:
    """Return the number of the attempt after all that have left a log directory."""
    names = (_ATTEMPT_NAME.fullmatch(path.name) for path in (run_dir / LOGS).glob("attempt-*"))
    return max((int(name[1]) for name in names if name), default=-1) + 1


def claim_attempt(run_dir: Path) -> int:
    """Take the next number for an attempt; no other process can get the same one.

    The record of events counts as well: somebody may have cleared the logs away.
    """
    recorded = [event.get("attempt") for event in read_lines(run_dir / EVENTS)]
    newest = max((attempt for attempt in recorded if isinstance(attempt, int)), default=-1)
    while True:
        number = max(next_attempt(run_dir), newest + 1)
        try:
            attempt_dir(run_dir, number).mkdir(parents=True)
        except FileExistsError:
            continue
        return number


def this_attempt() -> int:
    """Return the attempt that this worker belongs to; under plain torchrun, its restart count."""
    return int(os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def newer_attempt(run_dir: Path) -> int | None:
    """Return the number of an attempt after this worker's own, if there is one.

    Then this worker belongs to a group that was given up, and must not write to the run.
    """
    newest = next_attempt(run_dir) - 1
    return newest if newest > this_attempt() else None


def attempt_dir(run_dir: Path, attempt: int) -> Path:
    """Return where the logs of one attempt lie."""
    return run_dir / LOGS / f"attempt-{attempt}"


def leave_last_words(run_dir: Path, words: LastWords) -> None:
    """Say why this worker ends, for the supervisor to read once it has."""
    path = _words_path(run_dir, this_attempt(), words.rank)
    with suppress(OSError):  # a full disk: the exit code has to do
        path.write_text(json.dumps(asdict(words)), encoding="utf-8")


def last_words(run_dir: Path, attempt: int, rank: int) -> LastWords | None:
    """Return why a worker ended; None if it had no time to say, as after SIGKILL."""
    try:
        return LastWords(**json.loads(_words_path(run_dir, attempt, rank).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _words_path(run_dir: Path, attempt: int, rank: int) -> Path:
    return attempt_dir(run_dir, attempt) / f"rank-{rank}.error.json"
