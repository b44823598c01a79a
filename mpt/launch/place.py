"""Where a node is: its name, the address that others reach it at, and the interface behind that."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from mpt.errors import UsageError

_SIOCGIFADDR = 0x8915

_NOBODY = "192.0.2.1"
"""TEST-NET-1: an address that nobody has, beyond the default route."""


@dataclass
class Place:
    """This node, among those of a run."""

    node: str
    """Its name in messages and records."""
    own_host: str = "127.0.0.1"
    """Where other nodes reach it; known better once it has spoken with one."""
    port: int = 0
    """Where to listen while leading; 0 is any."""
    leads_first: bool = True
    """It need not leave the lead to another node at the start."""


def find_place(node: str | None, rendezvous: str | None, *, several: bool) -> Place:
    """Return this node's place.

    Args:
        node: a name; null is the host's.
        rendezvous: HOST:PORT of the node that leads first; null leaves that to whoever is first.
        several: whether there may be other nodes.

    Raises:
        UsageError: if the rendezvous is not HOST:PORT.
    """
    name = node or socket.gethostname()
    if rendezvous is None:
        return Place(name, _address_towards(_NOBODY) if several else "127.0.0.1")
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--rdzv {rendezvous}: is not HOST:PORT, such as node-1:29400.")
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--rdzv {rendezvous}: {host} is not known here: {error}") from error
    mine = _is_own(address)
    if not mine:
        return Place(name, _address_towards(address, _NOBODY), int(port), leads_first=False)
    if address.startswith("127.") and host not in (address, "localhost"):
        # A machine's own name may mean a loopback address to itself, and to nobody else.
        address = _address_towards(_NOBODY)
    return Place(name, address, int(port))


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address; None for the loopback, or if unknown."""
    return next((name for name, has in _interfaces() if has == address), None)


def _interfaces() -> Iterator[tuple[str, str]]:
    """Yield name and address of each network interface but the loopback."""
    if sys.platform != "linux":
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("256s", name.encode()[:15]))
            try:
                fcntl.ioctl(probe, _SIOCGIFADDR, request, True)
            except OSError:  # it has no address of this kind
                continue
            address = socket.inet_ntoa(request[20:24].tobytes())
            if not address.startswith("127."):
                yield name, address


def _address_towards(*others: str) -> str:
    """Return the address that this machine would send from; nothing is sent to find out."""
    for other in others:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((other, 9))
                return str(probe.getsockname()[0])
            except OSError:  # no way leads there
                continue
    return next((address for _, address in _interfaces()), "127.0.0.1")


def _is_own(address: str) -> bool:
    """Whether an address is one of this machine's: only those can be bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
