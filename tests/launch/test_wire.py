"""Laws of the wire, over real sockets: whole messages or an end, and nobody waits for a peer."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt.launch.wire import LIMIT_BYTES, Closed, Message, Wire, connect, listen

PATIENCE_S = 60.0


@contextmanager
def peers() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the bare socket at its other end."""
    with listen("127.0.0.1", 0) as server:
        wire = connect(f"127.0.0.1:{server.getsockname()[1]}")
        select.select([server], [], [], PATIENCE_S)
        other, _ = server.accept()
    with closing(wire), other:
        other.setblocking(True)
        yield wire, other


def bare(wire: Wire) -> socket.socket:
    """Return the socket of a wire, to be closed on its own."""
    return socket.fromfd(wire.fileno(), socket.AF_INET, socket.SOCK_STREAM)


def await_data(wire: Wire) -> None:
    assert select.select([wire], [], [], PATIENCE_S)[0], "nothing came"


def receive(wire: Wire, n: int) -> list[Message]:
    """Return the next `n` messages."""
    found: list[Message] = []
    while len(found) < n:
        await_data(wire)
        found += wire.receive()
    return found


values = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.text()))
messages = st.fixed_dictionaries({"kind": st.text()}, optional={"a": values, "b": values})


@given(st.lists(messages, min_size=1, max_size=8), st.data())
def test_messages_come_whole_and_in_order_however_the_network_cuts_them(
    sent: list[Message], data: st.DataObject
) -> None:
    with peers() as (wire, other), closing(Wire(other)) as sender, bare(wire) as connection:
        stream = bytearray()
        # What the sender would write, cut anew: its own cuts are the kernel's affair.
        for message in sent:
            sender.send(message)
        while stream.count(b"\n") < len(sent):
            await_data(wire)
            stream += connection.recv(1 << 16)
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
        edges = [0, *sorted(set(cuts) - {0, len(stream)}), len(stream)]
        found: list[Message] = []
        for start, stop in pairwise(edges):
            other.sendall(stream[start:stop])
            await_data(wire)
            found += wire.receive()
            assert len(found) == stream[:stop].count(b"\n")
        assert found == sent
        assert wire.receive() == []


def test_the_end_comes_after_the_last_message() -> None:
    with peers() as (wire, other):
        other.sendall(b'{"kind": "a"}\n{"kind": "b"}\n{"kind": "cut o')
        other.close()
        assert [message["kind"] for message in receive(wire, 2)] == ["a", "b"]
        with pytest.raises(Closed, match="closed the connection"):
            wire.receive()


def test_a_reset_is_an_end_like_any_other() -> None:
    with peers() as (wire, other):
        wire.send({"kind": "unread"})
        select.select([other], [], [], PATIENCE_S)
        other.close()  # with something unread, which the kernel answers by a reset
        await_data(wire)
        with pytest.raises(Closed):
            wire.receive()
        with pytest.raises(Closed):
            wire.send({"kind": "too late"})


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r",
        b"",
        b"\x80\x03}q\x00.",
        b"[]",
        b"{}",
        b"null",
        b'{"kind": 1}',
        b"[" * 100_000,
        b"1" * 100_000,
        b"\xff\xfe",
    ],
)
def test_who_does_not_speak_the_protocol_is_not_heard(line: bytes) -> None:
    with peers() as (wire, other):
        other.sendall(line + b"\n")
        with pytest.raises(Closed, match="does not speak"):
            receive(wire, 1)


def test_a_message_without_an_end_is_not_waited_for() -> None:
    with peers() as (wire, other):
        other.setblocking(False)
        with pytest.raises(Closed, match="too long"):  # noqa: PT012 - it is read as it is sent
            for _ in range(10 * LIMIT_BYTES // (1 << 16)):
                _, writable, _ = select.select([], [other], [], PATIENCE_S)
                if writable:
                    other.send(b" " * (1 << 16))
                assert wire.receive() == []


def test_a_peer_that_does_not_read_is_given_up_and_nobody_blocks() -> None:
    with peers() as (wire, _):
        message = {"kind": "much", "text": "x" * (1 << 16)}
        with pytest.raises(Closed, match="stopped reading"):  # noqa: PT012 - one of them does
            for _ in range(1000):  # 64 MiB: more than any socket buffer
                wire.send(message)


def test_a_long_message_goes_out_bit_by_bit_as_there_is_room() -> None:
    message = {"kind": "stacks", "text": "é\n" * (LIMIT_BYTES // 12)}
    with peers() as (wire, other), closing(Wire(other)) as reader:
        with bare(wire) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        wire.send(message)
        found: list[Message] = []
        while not found:
            await_data(reader)
            found = reader.receive()
            wire.flush()
        assert found == [message]


def test_silence_is_counted_from_the_last_thing_said() -> None:
    with peers() as (wire, other):
        assert not wire.was_heard
        assert wire.receive() == []
        assert not wire.was_heard
        other.sendall(b'{"kind"')
        await_data(wire)
        began = time.monotonic()
        assert wire.receive() == [], "it is no message yet, but a sign of life"
        assert wire.was_heard
        assert wire.silent_s <= time.monotonic() - began


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:0"])
def test_where_nobody_is_there_is_no_connection(address: str) -> None:
    with pytest.raises(Closed):
        connect(address)


def test_a_port_that_nobody_listens_on_any_more_is_closed() -> None:
    with listen("127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(Closed, match=address):
        connect(address)


def test_a_port_that_is_taken_becomes_another() -> None:
    with listen("127.0.0.1", 0) as first:
        taken = first.getsockname()[1]
        with listen("127.0.0.1", taken) as second:
            assert second.getsockname()[1] not in (0, taken)


def test_only_an_address_of_this_machine_is_listened_on() -> None:
    with pytest.raises(OSError, match="assign"):
        listen("192.0.2.1", 0)


def test_each_side_knows_where_it_is_reached() -> None:
    with peers() as (wire, other), closing(Wire(other)) as there:
        assert wire.own_host == there.peer_host == "127.0.0.1"
        assert there.own_host == wire.peer_host == "127.0.0.1"
