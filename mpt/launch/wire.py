"""Messages between supervisors: JSON lines over TCP that never block the one who sends."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

Message = dict[str, Any]

LIMIT_BYTES = 8 << 20
"""A line, or a backlog of lines not yet taken by the other side, beyond this ends a connection."""

CONNECT_S = 2.0


class Closed(ConnectionError):  # noqa: N818 - an end, not always an error
    """The other side is gone, or said something that is not a message."""


class Wire:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._unread = b""
        self._unsent = b""
        self._heard = time.monotonic()
        self.was_heard = False
        """The other side has said something."""

    @property
    def silent_s(self) -> float:
        """Seconds since the other side said something."""
        return time.monotonic() - self._heard

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def own_host(self) -> str:
        """The address of this machine that the other side is reached from."""
        return str(self._socket.getsockname()[0])

    @property
    def peer_host(self) -> str:
        """The address of the other side."""
        return str(self._socket.getpeername()[0])

    def send(self, message: Message) -> None:
        """Send what the other side has room for now; the rest goes with the next call.

        Raises:
            Closed: it is gone, or has not read for long.
        """
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send more of what is left.

        Raises:
            Closed: it is gone, or has not read for long.
        """
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > LIMIT_BYTES:
                raise Closed("it has stopped reading") from None
        except OSError as error:
            raise Closed(error.strerror or "the connection broke") from error

    def receive(self) -> list[Message]:
        """Return the messages that have come in whole.

        Raises:
            Closed: the other side is gone and has said nothing more.
        """
        ended: str | None = None
        try:
            while data := self._socket.recv(1 << 16):
                self._unread += data
                self._heard, self.was_heard = time.monotonic(), True
                if len(self._unread) > LIMIT_BYTES:
                    raise Closed("its message is too long")
            ended = "it closed the connection"
        except BlockingIOError:
            pass
        except Closed:
            raise
        except OSError as error:
            ended = error.strerror or "the connection broke"
        *lines, self._unread = self._unread.split(b"\n")
        if ended is not None and not lines:
            raise Closed(ended)
        return [_parse(line) for line in lines]

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise Closed("it does not speak this protocol") from None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise Closed("it does not speak this protocol")
    return message


def connect(address: str) -> Wire:
    """Connect to host:port.

    Raises:
        Closed: nobody is there, or not in time.
    """
    host, _, port = address.rpartition(":")
    try:
        return Wire(socket.create_connection((host, int(port)), timeout=CONNECT_S))
    except (OSError, ValueError) as error:
        raise Closed(f"{address}: {error}") from error


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0, or one that is taken, becomes any free one."""
    try:
        server = socket.create_server((host, port), backlog=128)
    except OSError:
        if port == 0:
            raise
        server = socket.create_server((host, 0), backlog=128)
    server.setblocking(False)
    return server
