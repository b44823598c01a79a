"""A whole file from a URL: asked for again after faults that pass, and no longer than allowed."""

from __future__ import annotations

import io
import os
import random
import threading
import time
from dataclasses import dataclass, field
from typing import BinaryIO

from mpt.data.remote import RestartError, TransientError, ask
from mpt.errors import DataError
from mpt.storage import without_secrets

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
"""Between two attempts; the real pause is drawn from zero to twice the one before, up to this."""


class CorruptError(Exception):
    """A file came whole, but is not the one that the index describes."""


class StoppedError(Exception):
    """Nobody waits for the file any more."""


@dataclass(frozen=True)
class Patience:
    """How long a file may take."""

    timeout_s: float
    """For each wait on the server."""
    deadline_s: float
    """For all attempts together."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set it to end every download at its next block."""
    began: float = field(default_factory=time.monotonic)
    """When the deadline's clock started."""


def fetch_small(url: str, limit_bytes: int, patience: Patience) -> tuple[bytes, str | None]:
    """Return a file and its version, if the server gives it one.

    Raises:
        RefusedError: it is not there, or not for us.
        DataError: no answer within the deadline, or a file of more than `limit_bytes`.
    """
    file = io.BytesIO()
    try:
        version = Download(url, file, None, limit_bytes, patience).run()
    except CorruptError as error:
        raise DataError(f"{without_secrets(url)}: {error}.") from error
    return file.getvalue(), version


class Download:
    """Adds to an open file what it lacks of the one at a URL."""

    def __init__(
        self, url: str, file: BinaryIO, size: int | None, limit_bytes: int, patience: Patience
    ) -> None:
        """Ask nothing yet.

        Args:
            file: what it holds already is taken for the beginning.
            size: bytes that the file must have, or null: what the server says, or gives.
            limit_bytes: more are never written.
        """
        self._url, self._file, self._size, self._limit_bytes = url, file, size, limit_bytes
        self._patience = patience
        self._deadline = patience.began + patience.deadline_s
        self._version: str | None = None

    def run(self) -> str | None:
        """Make the file whole, and return the version of what it is a copy of.

        Raises:
            RefusedError: the server has no such file, or not for us.
            CorruptError: the server's file is of another size. To begin anew, empty the file.
            DataError: no whole file within the deadline; names the URL and the last fault.
            StoppedError: nobody waits any more.
        """
        pause, attempts = FIRST_PAUSE_S, 0
        while True:
            before, attempts = self._file.seek(0, os.SEEK_END), attempts + 1
            try:
                self._attempt(before)
            except TransientError as error:
                fault = error
            else:
                return self._version
            if isinstance(fault, RestartError):
                self._file.truncate(0)
            if self._file.seek(0, os.SEEK_END) > before:
                pause = FIRST_PAUSE_S
            wait_s = random.uniform(0.0, pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            if time.monotonic() + wait_s >= self._deadline:
                raise DataError(
                    f"{without_secrets(self._url)}: not fetched within "
                    f"{self._patience.deadline_s:g} s, in {attempts} attempts; the last: {fault}. "
                    "Is the server up, and fast enough? data.cache.deadline_s allows more time."
                ) from fault
            if self._patience.stop.wait(wait_s):
                raise StoppedError

    def _attempt(self, place: int) -> None:
        """Make one request, for what follows the first `place` bytes."""
        if place == self._size:
            return
        with ask(self._url, place, self._patience.timeout_s) as answer:
            size = answer.total if self._size is None else self._size
            if answer.total not in (None, size):
                raise CorruptError(f"it has {answer.total} bytes; the index says {size}")
            if answer.start and self._version not in (None, answer.version):
                raise RestartError("the file has changed meanwhile")
            self._version = answer.version
            if answer.start != place:
                self._file.truncate(answer.start)
                place = self._file.seek(answer.start)
            most = self._limit_bytes if size is None else size
            if most > self._limit_bytes:
                raise CorruptError(f"it has {most} bytes; {self._limit_bytes} is the most it may")
            while block := answer.read():
                place += len(block)
                if place > most:
                    raise CorruptError(f"it has more bytes than the {most} it may")
                self._file.write(block)
                if self._patience.stop.is_set():
                    raise StoppedError
                if time.monotonic() > self._deadline:
                    raise TransientError(f"too slow: {place} bytes so far")
        if size is not None and place < size:
            raise TransientError(f"cut off after {place} of {size} bytes")
