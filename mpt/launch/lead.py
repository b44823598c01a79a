"""Leading: carries the coordinator's orders to the nodes, and their reports to it."""

from __future__ import annotations

import hmac
import selectors
import socket
import time
from contextlib import suppress

from mpt import errors
from mpt.launch.coordinator import NODE_SILENT_S, Coordinator
from mpt.launch.ending import End
from mpt.launch.fault import Fault
from mpt.launch.lease import Lease
from mpt.launch.node import Node
from mpt.launch.place import interface_of
from mpt.launch.run import Run
from mpt.launch.signals import Signals
from mpt.launch.wire import Closed, Message, Wire, listen
from mpt.log import Journal, read_lines, say
from mpt.rundir import EVENTS

WATCH_S = 0.1
"""How often workers are looked at: a dead one is seen within this."""

ALIVE_S = 1.0
"""How often the coordinator says that it is there."""

MOST_STRANGERS = 64
"""Connections that may be there without having said who they are."""

NAP_S = 2.0
"""After a turn that took longer, somebody else may lead: look before deciding anything."""

HELLO_S = 5.0
"""A connection that has not said who it is by then is closed."""


class Leader:
    """Runs the coordinator beside this machine's own node, until the run is over."""

    def __init__(self, run: Run, node: Node, lease: Lease, signals: Signals) -> None:
        self._run, self._node, self._lease, self._signals = run, node, lease, signals
        self._journal = Journal(run.run_dir)
        self._coordinator = Coordinator(
            run.run_dir,
            run.cfg,
            self._journal,
            committed=run.committed,
            past_events=list(read_lines(run.run_dir / EVENTS)),
            say=lambda text: say(f"mpt: {text}\n"),
        )
        self._selector = selectors.DefaultSelector()
        self._wires: dict[str, Wire] = {}
        self._launches: dict[str, str] = {}
        self._strangers: dict[Wire, float] = {}
        self._said_alive = 0.0
        self._last_turn = time.monotonic()

    def lead(self, lost: Fault | None) -> End | None:
        """Lead until the run is over, or until another node should; that is None.

        Args:
            lost: that of the node which led before, to be accounted for.
        """
        address = None
        host = "127.0.0.1"
        server = None
        if self._run.cfg.max_nodes > 1:
            host = self._run.place.own_host
            server = listen("", self._run.place.port)
            address = f"{host}:{server.getsockname()[1]}"
            self._selector.register(server, selectors.EVENT_READ)
            say(f"mpt: node {self._node.name} leads at {address}.\n")
        self._lease.publish(address=address, ready=True)
        self._node.reachable_at(host, interface_of(host))
        self._node.join()
        self._coordinator.joined(self._node.name, host, time.monotonic())
        if lost is not None:
            self._coordinator.inherit(lost)
        try:
            while self._coordinator.end is None:
                if self._has_lost_the_lead():
                    say(f"mpt: node {self._node.name} was asleep, and has lost the lead.\n")
                    return None
                self._turn(server)
                if self._coordinator.is_forsaken(time.monotonic()):
                    say(f"mpt: node {self._node.name} reaches no other: it leads no more.\n")
                    return None
            return self._say_end(self._coordinator.end)
        finally:
            if server is not None:
                server.close()
            for wire in [*self._wires.values(), *self._strangers]:
                wire.close()
            self._selector.close()

    def _has_lost_the_lead(self) -> bool:
        """Whether another leads now. Asked before each turn: one that was asleep would take the
        nodes that have left it for lost."""
        now = time.monotonic()
        napped, self._last_turn = now - self._last_turn > NAP_S, now
        return self._lease.lost or (napped and not self._lease.holds())

    def _turn(self, server: socket.socket | None) -> None:
        ready = self._selector.select(WATCH_S)
        now = time.monotonic()
        if server is not None and any(key.fileobj is server for key, _ in ready):
            with suppress(OSError):
                connection, _ = server.accept()
                self._strangers[Wire(connection)] = now
            if len(self._strangers) > MOST_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.close()
        for name, wire in list(self._wires.items()):
            try:
                for report in wire.receive():
                    self._coordinator.heard(name, report, now)
            except Closed as closed:
                self._drop(name, str(closed), now)
        self._greet(now)  # after the farewells: who comes back has left before
        for report in self._node.turn():
            self._coordinator.heard(self._node.name, report, now)
        for number in self._signals.take():
            self._coordinator.stop(number, now)
        if self._signals.now and self._coordinator.end is None:
            self._coordinator.finish(End(errors.EXIT_INTERRUPTED))
        self._coordinator.turn(now)
        self._deliver(now)

    def _greet(self, now: float) -> None:
        """Let in those who show what only the run directory tells; the rest is sent away."""
        for wire, since in list(self._strangers.items()):
            try:
                messages = wire.receive()
                if not messages:
                    if now - since > HELLO_S:
                        raise Closed("it said nothing")
                    continue
                name = self._admit(wire, messages[0], now)
                host = wire.peer_host
            except (Closed, OSError):  # the latter: gone already
                del self._strangers[wire]
                wire.close()
                continue
            del self._strangers[wire]
            self._wires[name] = wire
            self._selector.register(wire, selectors.EVENT_READ)
            self._launches[name] = str(messages[0].get("launch"))
            self._coordinator.joined(name, host, now)
            if messages[0].get("lost") is not None:
                self._coordinator.inherit(Fault(**messages[0]["lost"]))
            for report in messages[1:]:
                self._coordinator.heard(name, report, now)

    def _admit(self, wire: Wire, hello: Message, now: float) -> str:
        shown, name = ascii(hello.get("nonce")), str(hello.get("node"))
        wanted = ascii(self._lease.claim.nonce)  # compare_digest wants ASCII; this may be anything
        if hello["kind"] != "hello" or not hmac.compare_digest(shown, wanted):
            raise Closed("it does not belong to this run")
        if name in self._wires and hello.get("launch") == self._launches[name]:
            self._drop(name, "it has come anew", now)
        why = None
        if name in self._wires or name == self._node.name:
            why = f"a node called {name} is there already; give each its own --node NAME."
        elif hello.get("identity") != self._run.identity:
            why = "this node was started with another recipe than the one that leads."
        if why is not None:
            wire.send({"kind": "refused", "why": why})
            raise Closed(why)
        return name

    def _drop(self, name: str, why: str, now: float) -> None:
        wire = self._wires.pop(name)
        self._selector.unregister(wire)
        wire.close()
        self._coordinator.left(name, why, now)

    def _deliver(self, now: float) -> None:
        orders, self._coordinator.orders = self._coordinator.orders, []
        if now - self._said_alive > ALIVE_S:
            self._said_alive = now
            orders += [(name, {"kind": "alive"}) for name in self._wires]
        for name, order in orders:
            if name == self._node.name:
                self._node.handle(order)
            elif (wire := self._wires.get(name)) is not None:
                try:
                    wire.send(order)
                except Closed as closed:
                    self._drop(name, str(closed), now)
        for name in set(self._wires) - self._coordinator.members:
            self._drop(name, "it was silent", now)

    def _say_end(self, end: End) -> End:
        """Wait until the other nodes have heard the end, and closed their side."""
        self._deliver(time.monotonic())
        deadline = time.monotonic() + NODE_SILENT_S
        while self._wires and time.monotonic() < deadline:
            for name, wire in list(self._wires.items()):
                try:
                    wire.flush()
                    wire.receive()
                except Closed:
                    self._wires.pop(name).close()
            time.sleep(WATCH_S)
        return end
