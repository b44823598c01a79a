"""A file on a web server, read like one on the disk: of one version, and on after faults that pass.

fsspec's own way takes every refusal for a missing file, and mixes versions of a file that changes.
"""

from __future__ import annotations

import io
import os
import random
import time
from contextlib import ExitStack

from mpt.data.remote import Answer, RefusedError, RestartError, TransientError, ask

TIMEOUT_S = 20.0
"""For each wait on the server."""
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Between attempts that bring nothing; the real pause is drawn from zero to twice as long."""
SKIPPED_BYTES = 1 << 20
"""So far ahead, reading on is cheaper than another request."""


def is_there(url: str) -> bool:
    """Say whether a web server has a file for us. Raises OSError if it does not come to answer."""
    try:
        WebFile(url).close()
    except FileNotFoundError:
        return False
    return True


class WebFile(io.RawIOBase):
    """A file at an http or https URL; what goes wrong is an OSError."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = 0
        self._failures = 0
        self._answer: Answer | None = None
        self._held = ExitStack()
        self._ready = memoryview(b"")
        self._first: Answer | None = None
        self._first = self._asked()

    @property
    def size(self) -> int | None:
        """Bytes of the file; None where the server does not say."""
        return self._first.total if self._first else None

    @property
    def version(self) -> str | None:
        """What changes when the file does; None where the server does not say."""
        return self._first.version if self._first else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.size is not None

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        if base is None:
            raise OSError("the server does not say how long the file is")
        place = max(0, base + offset)
        if not 0 <= place - self._place <= SKIPPED_BYTES:
            self._drop()
            self._place = place
        while self._place < place and self.read(place - self._place):
            pass
        self._place = place
        return place

    def close(self) -> None:
        self._drop()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._ready:
            self._ready = memoryview(self._block())
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        self._place += size
        return size

    def _block(self) -> bytes:
        """Return the next bytes, asked for as often as it takes; none at the end."""
        while self.size is None or self._place < self.size:
            try:
                answer = self._asked()
                block = bytes(self._ready) or answer.read()
                if not block and self.size is not None:
                    raise TransientError(f"cut off after {self._place} of {self.size} bytes")
            except (TransientError, RefusedError) as error:
                self._failed(error)
            else:
                self._failures = 0
                return block
        return b""

    def _asked(self) -> Answer:
        """Return the answer that has the next byte, of the version that was begun with."""
        while self._answer is None:
            try:
                answer = self._held.enter_context(ask(self._url, self._place, TIMEOUT_S))
                if self._first is not None and answer.version != self._first.version:
                    raise OSError("the file was changed while it was read; run this again")
                self._skip(answer)
                self._answer = answer
            except (TransientError, RefusedError) as error:
                self._failed(error)
        return self._answer

    def _skip(self, answer: Answer) -> None:
        """Read up to our place what a server sends that knows no parts of files."""
        behind = self._place - answer.start
        while behind > 0:
            if not (block := answer.read()):
                raise TransientError(f"cut off {behind} bytes before byte {self._place}")
            self._ready = memoryview(block)[behind:]
            behind -= len(block)

    def _failed(self, error: Exception) -> None:
        """Wait before another attempt; raise OSError if there shall be none."""
        self._drop()
        if isinstance(error, RefusedError):
            raise FileNotFoundError(str(error)) from error
        if isinstance(error, RestartError) or self._failures == len(PAUSES_S):
            raise OSError(str(error) or "the server has no such part of the file") from error
        time.sleep(random.uniform(0.0, 2 * PAUSES_S[self._failures]))
        self._failures += 1

    def _drop(self) -> None:
        """Let go of the connection and of what came in."""
        self._held.close()
        self._answer, self._ready = None, memoryview(b"")
