"""Where the threads of a rank are: written by the rank on a signal, asked for and read here.

faulthandler writes from a signal handler in C, so a rank says where it is also while it loops,
holds the interpreter's lock, or sits in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STACK_SIGNAL = signal.SIGUSR2
"""Asks a rank for its stacks."""

STOPPED, TRACED, UNINTERRUPTIBLE, ZOMBIE, GONE = "T", "t", "D", "Z", ""
"""States of a process as /proc/PID/stat spells them; no letter if there is no process."""

STDERR = 2

SETTLED_S = 0.15
"""A file that has not grown for this long is complete."""

LIMIT_BYTES = 1 << 14
"""The most that is read of one rank's stacks: what says something is a few thousand bytes."""

_THREAD = re.compile(
    r"(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[.*\])? \(most recent call first"
)
_FRAME = re.compile(r'  File (?:"(.*)"|\?\?\?), line (\d+|\?\?\?) in (.*)')


@dataclass(frozen=True)
class Frame:
    """One call: the line it has come to."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Dump:
    """What a rank's process could say when it was asked."""

    process: str
    """Its state as it was found."""
    text: str
    """What faulthandler wrote; empty if it did not."""


def stack_file(directory: Path, rank: int) -> Path:
    """Return where a rank writes its stacks, in the log directory of an attempt."""
    return directory / f"rank-{rank}.stacks"


def answer_stack_signal(path: Path) -> None:
    """Have this process append its stacks to a file when it is asked, and to stderr at a crash.

    If the file cannot be opened it is stderr for both: a signal without a handler would kill.
    """
    faulthandler.enable(STDERR)
    try:
        file: IO[bytes] | int = path.open("ab", buffering=0)  # left open: written at any time
    except OSError:
        file = STDERR
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True, chain=False)


def dump_stacks(
    pids: Mapping[int, int], files: Mapping[int, Path], patience_s: float = 2.0
) -> dict[int, Dump]:
    """Ask processes for their stacks, and return what each one wrote.

    It does them no harm, except that one that was stopped is woken for it.

    Args:
        pids: process by rank.
        files: the same ranks' `stack_file`.
        patience_s: those that have not answered by then are not able to.
    """
    sizes = {rank: _size(files[rank]) for rank in pids}
    states = {rank: process_state(pid) for rank, pid in pids.items()}
    asked = [rank for rank, pid in pids.items() if _listens(pid)]
    for rank in asked:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pids[rank], STACK_SIGNAL)
            if states[rank] == STOPPED:
                os.kill(pids[rank], signal.SIGCONT)
    _await_growth({files[rank]: sizes[rank] for rank in asked}, patience_s)
    dumps = {}
    for rank, state in states.items():
        # A wait for the disk that is over by now is no finding.
        lasting = process_state(pids[rank]) if state == UNINTERRUPTIBLE else state
        dumps[rank] = Dump(lasting, _read_from(files[rank], sizes[rank]))
    return dumps


def process_state(pid: int) -> str:
    """Return the letter of /proc/PID/stat: R, S, D, T, t, Z; empty if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return GONE
    return stat.rpartition(")")[2].split()[0]  # the name before it may hold anything


def _listens(pid: int) -> bool:
    """Return whether a process has a handler for the signal, which else would end it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (STACK_SIGNAL - 1) & 1)


def parse_stacks(text: str) -> dict[int, tuple[Frame, ...]]:
    """Return the frames of each thread, innermost first, by identity, in the order written.

    Understands what Python 3.11 to 3.14 write, and passes over the rest. The main thread comes
    last: threads are listed from the newest to the oldest.
    """
    threads: dict[int, list[Frame]] = {}
    frames: list[Frame] = []
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            frames = []
            # Asked twice, a rank has written twice: what it wrote last counts.
            threads.pop(int(thread[1], 16), None)
            threads[int(thread[1], 16)] = frames
        elif frame := _FRAME.match(line):
            number = int(frame[2]) if frame[2].isdigit() else 0
            frames.append(Frame(frame[1] or "???", number, frame[3]))
    return {identity: tuple(found) for identity, found in threads.items()}


def _await_growth(files: Mapping[Path, int], patience_s: float) -> None:
    """Return once every file has grown beyond its size and rested, or patience is over."""
    deadline = time.monotonic() + patience_s
    last = dict(files)
    still_since = time.monotonic()
    while (now := time.monotonic()) < deadline:
        sizes = {path: _size(path) for path in files}
        if sizes != last:
            last, still_since = sizes, now
        grown = all(sizes[path] > before for path, before in files.items())
        if grown and now - still_since >= SETTLED_S:
            return
        time.sleep(0.02)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            # The end rather than the beginning: the main thread is written last.
            file.seek(max(offset, _size(path) - LIMIT_BYTES))
            return file.read(LIMIT_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
