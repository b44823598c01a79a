"""Stop signals of a supervisor: taken in at once, acted on by its loop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from mpt.launch.attempt import STOP_SIGNALS


class Stopped(KeyboardInterrupt):
    """A stop signal came in where there is nothing to save, and nobody to ask."""


@dataclass
class Signals:
    """Stop signals that have come in."""

    pending: list[int] = field(default_factory=list)
    interrupts: int = 0
    latest: int = 0
    """The one that came in last, taken or not; 0 if there was none."""
    _raise: bool = False

    @property
    def now(self) -> bool:
        """A second Ctrl-C: do not wait for anything."""
        return self.interrupts > 1

    def receive(self, number: int, _: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        self.latest = number
        self.pending.append(number)
        if self._raise:
            raise Stopped(number)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise Stopped as soon as a signal comes, within long work that does not look."""
        self._raise = True
        try:
            if self.latest:
                raise Stopped(self.latest)
            yield
        finally:
            self._raise = False

    def take(self) -> list[int]:
        """Return the signals since the last call."""
        taken_now, self.pending = self.pending, []
        return taken_now


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """Take over the stop signals for a while."""
    signals = Signals()
    # Under nohup a hangup is ignored, and shall be.
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heeded = [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, signals.receive) for number in heeded}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
