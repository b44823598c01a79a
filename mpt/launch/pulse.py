"""A rank's sign of life: a few numbers in memory that its supervisor can read at any time.

The memory is an anonymous file that the supervisor made and the rank inherited. The rank's main
thread writes what it begins, so a rank that is stopped, loops or waits for ever falls silent
whatever its other threads do.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import IntEnum

PULSE_FD = "MPT_PULSE_FD"
"""Environment variable: the file descriptor of this rank's pulse."""

RECENT = 32
"""Phases of one kind whose longest is remembered."""

_RECORD = struct.Struct("<QqqddQQ")  # sequence, phase, step, at, slowest, thread, sequence
_SIZE = 4096


class Phase(IntEnum):
    """What a rank's main thread is doing."""

    START = 0
    """Everything before the first step."""
    FIRST_STEP = 1
    STEP = 2
    SAVE = 3
    EVALUATE = 4
    """One batch of an evaluation."""
    END = 5
    """Everything after the last step."""


@dataclass(frozen=True)
class Beat:
    """The latest thing a rank said."""

    phase: Phase
    step: int
    """Steps finished."""
    at: float
    """`time.monotonic()` when the phase began; the same clock in all processes of a machine."""
    slowest_s: float
    """The longest of the recent phases of this kind; 0 if there was none."""
    thread: int
    """Identity of the main thread, as faulthandler prints it."""


class Pulse:
    """Writes beats on a rank's side; reads them on its supervisor's."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._sequence = 0
        self._phase, self._began = Phase.START, time.monotonic()
        self._recent: dict[Phase, deque[float]] = {}
        self._last = Beat(Phase.START, 0, self._began, 0.0, 0)

    @classmethod
    def create(cls) -> Pulse:
        """Return one in new memory, for a rank to inherit."""
        descriptor = anonymous_file("mpt-pulse")
        os.ftruncate(descriptor, _SIZE)
        pulse = cls(descriptor)
        pulse.beat(Phase.START, 0)
        return pulse

    @classmethod
    def inherited(cls) -> Pulse:
        """Return the one that the supervisor reads, or one that nobody does."""
        descriptor = os.environ.get(PULSE_FD)
        return cls(int(descriptor)) if descriptor else cls.create()

    def beat(self, phase: Phase, step: int) -> None:
        """Say that the main thread begins `phase`, with `step` steps finished."""
        now = time.monotonic()
        took = self._recent.setdefault(self._phase, deque(maxlen=RECENT))
        took.append(now - self._began)
        self._phase, self._began = phase, now
        slowest = max(self._recent.get(phase, ()), default=0.0)
        self._sequence += 1
        record = (self._sequence, phase, step, now, slowest, threading.get_ident(), self._sequence)
        _RECORD.pack_into(self._memory, 0, *record)

    def read(self) -> Beat:
        """Return the latest beat; never one that is half-written, as by a rank killed just then."""
        for _ in range(3):
            record = _RECORD.unpack_from(self._memory, 0)
            if record[0] == record[-1]:
                self._last = Beat(Phase(record[1]), *record[2:6])
                break
        return self._last

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
        os.close(self.descriptor)


def anonymous_file(name: str) -> int:
    """Return a descriptor of memory without a name in any file system: it goes with its users."""
    if sys.platform == "linux":
        return os.memfd_create(name, os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix=name)
    os.unlink(path)
    return descriptor
