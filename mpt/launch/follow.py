"""Following: this node does what the one that leads says, until the end or until it is lost."""

from __future__ import annotations

import selectors
from dataclasses import asdict

from mpt import errors
from mpt.errors import UsageError
from mpt.launch.coordinator import NODE_SILENT_S
from mpt.launch.ending import End
from mpt.launch.fault import Fault, lost_node
from mpt.launch.lead import WATCH_S
from mpt.launch.lease import Claim
from mpt.launch.node import Node
from mpt.launch.place import interface_of
from mpt.launch.run import Run
from mpt.launch.signals import Signals
from mpt.launch.wire import Closed, Wire, connect
from mpt.log import say


def follow(
    run: Run, node: Node, claim: Claim, address: str, lost: Fault | None, signals: Signals
) -> End | Fault | None:
    """Do what the node that leads says.

    Args:
        lost: what became of the one that led before, for the new one to account for.

    Returns:
        The end of the run; or what became of the one that led, with no worker left here; or None
        if it could not be reached in the first place.
    """
    try:
        wire = connect(address)
    except Closed:
        return None
    fault = None
    was_running = False
    try:
        hello = {"kind": "hello", "nonce": claim.nonce, "node": node.name, "launch": node.launch}
        told = None if lost is None else asdict(lost)
        wire.send({**hello, "identity": run.identity, "lost": told})
        say(f"mpt: node {node.name} follows {claim.node} at {address}.\n")
        run.place.own_host = wire.own_host
        node.reachable_at(wire.own_host, interface_of(wire.own_host))
        node.join()
        return _obey(wire, node, signals)
    except Closed as closed:
        was_running = node.is_running
        if wire.was_heard:
            step = max(node.step, run.committed())
            fault = lost_node(claim.node, str(closed), step, wire.silent_s)
            say(f"mpt: {fault.why}; it led.\n")
    finally:
        wire.close()
        node.clear()
    if signals.latest and was_running:  # nobody to save with: what is committed stands
        interrupted = signals.interrupts > 0
        return End(errors.EXIT_INTERRUPTED if interrupted else errors.EXIT_TERMINATED)
    return fault


def _obey(wire: Wire, node: Node, signals: Signals) -> End:
    with selectors.DefaultSelector() as selector:
        selector.register(wire, selectors.EVENT_READ)
        while True:
            selector.select(WATCH_S)
            for order in wire.receive():
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
            if wire.silent_s > NODE_SILENT_S:
                raise Closed(f"silent for {wire.silent_s:.1f} s")
            wire.flush()
