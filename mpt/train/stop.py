"""Being asked to stop: the first signal is remembered, a second Ctrl-C ends the process at once."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from types import FrameType

from mpt.errors import EXIT_INTERRUPTED
from mpt.launch.attempt import STOP_SIGNALS


@dataclass
class StopSignal:
    """The signal that asked this rank to stop, or 0."""

    number: int = 0

    @classmethod
    def install(cls) -> StopSignal:
        """Take over the stop signals of this process."""
        stop = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, stop._receive)
        # The supervisor has held them back until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return stop

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        self.number = number
