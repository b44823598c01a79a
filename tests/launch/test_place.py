"""Laws of a node's place: what --rdzv may be, who leads first, which address others are given."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from mpt.errors import UsageError
from mpt.launch.place import Place, find_place, interface_of
from mpt.launch.wire import listen

ELSEWHERE = "192.0.2.1"  # TEST-NET-1: no machine has it


@pytest.mark.parametrize(
    "text",
    [
        "",
        "node-1",
        "node-1:",
        ":29400",
        "29400",
        "node-1:http",
        "node-1:-1",
        "node-1:65536",
        "node-1:²",
        "node-1:29400:",
        "node-1:29400 ",
    ],
)
def test_what_is_not_host_and_port_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not HOST:PORT, such as node-1:29400\.$"):
        find_place("a", text, several=True)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "two..dots", "x" * 64, "[::1]", "a b"])
def test_a_host_that_is_not_known_is_named(host: str) -> None:
    with pytest.raises(UsageError) as raised:
        find_place("a", f"{host}:29400", several=True)
    assert f"{host} is not known here" in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.3"])
def test_the_node_that_the_rendezvous_names_leads_first_and_there(host: str) -> None:
    address = "127.0.0.3" if host == "127.0.0.3" else "127.0.0.1"
    assert find_place("a", f"{host}:29400", several=True) == Place("a", address, 29400, True)


def test_another_node_leaves_the_lead_to_it_and_has_an_address_of_its_own() -> None:
    place = find_place("b", f"{ELSEWHERE}:29400", several=True)
    assert not place.leads_first
    assert place.own_host != ELSEWHERE
    listen(place.own_host, 0).close()


def test_a_name_that_means_loopback_only_to_itself_is_not_what_others_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def as_debian_does(*_: Any) -> list[Any]:  # /etc/hosts: 127.0.1.1 node-1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    outward = find_place("a", None, several=True).own_host
    monkeypatch.setattr(socket, "getaddrinfo", as_debian_does)
    assert find_place("a", "node-1:29400", several=True) == Place("a", outward, 29400, True)


def test_without_a_rendezvous_whoever_comes_first_leads() -> None:
    place = find_place(None, None, several=True)
    assert place.node == socket.gethostname()
    assert (place.port, place.leads_first) == (0, True)
    listen(place.own_host, 0).close()


def test_a_single_node_is_reached_by_nobody_else() -> None:
    assert find_place("a", None, several=False) == Place("a", "127.0.0.1", 0, True)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", ELSEWHERE, "not an address"])
def test_only_an_address_of_this_machine_that_others_see_has_an_interface(address: str) -> None:
    assert interface_of(address) is None


def test_the_interface_of_the_outward_address_is_one_of_this_machine() -> None:
    address = find_place("a", None, several=True).own_host
    if address.startswith("127."):
        pytest.skip("this machine has only the loopback")
    assert interface_of(address) in {name for _, name in socket.if_nameindex()}
