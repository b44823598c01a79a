"""Following: this node does what the one that leads says, until the end or until it is lost."""

from __future__ import annotations

import selectors
import time

from mpt import errors
from mpt.errors import UsageError
from mpt.launch.coordinator import NODE_SILENT_S
from mpt.launch.ending import End
from mpt.launch.lead import WATCH_S
from mpt.launch.lease import Claim
from mpt.launch.node import Node
from mpt.launch.place import interface_of
from mpt.launch.run import Run
from mpt.launch.signals import Signals, stop_signals
from mpt.launch.wire import Closed, Wire, connect
from mpt.log import say


def follow(run: Run, node: Node, claim: Claim, address: str) -> End | None:
    """Do what the node that leads says; return None once it is lost, with no worker left."""
    try:
        wire = connect(address)
    except Closed:
        return None
    with stop_signals() as signals:
        try:
            hello = {"kind": "hello", "nonce": claim.nonce, "node": node.name}
            wire.send({**hello, "identity": run.identity})
            say(f"mpt: node {node.name} follows {claim.node} at {address}.\n")
            run.place.own_host = wire.own_host
            node.reachable_at(wire.own_host, interface_of(wire.own_host))
            node.join()
            return _obey(wire, node, signals)
        except Closed as closed:
            say(f"mpt: node {claim.node}, which led, is lost: {closed}.\n")
        finally:
            wire.close()
            node.kill()
            while node.is_running:
                time.sleep(WATCH_S)
            node.turn()  # takes in that they have ended
        if signals.pending:  # nobody to save with: what is committed stands
            interrupted = signals.interrupts > 0
            return End(errors.EXIT_INTERRUPTED if interrupted else errors.EXIT_TERMINATED)
    return None


def _obey(wire: Wire, node: Node, signals: Signals) -> End:
    heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(wire, selectors.EVENT_READ)
        while True:
            selector.select(WATCH_S)
            for order in wire.receive():
                heard = time.monotonic()
                if order["kind"] == "end":
                    return End(int(order["exit_code"]), str(order["why"]))
                if order["kind"] == "refused":
                    raise UsageError(str(order["why"]))
                node.handle(order)
            for report in node.turn():
                wire.send(report)
            for number in signals.take():
                wire.send({"kind": "stop", "number": number})
            if signals.now:
                return End(errors.EXIT_INTERRUPTED)
            if time.monotonic() - heard > NODE_SILENT_S:
                raise Closed(f"silent for {NODE_SILENT_S:g} s")
            wire.flush()
