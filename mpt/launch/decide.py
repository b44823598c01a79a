"""What a fault means for the run: restart, and when, or end. History and fault in, decision out.

A restart costs one of the budget; each new checkpoint gives all of them back. Faults without a
new step in between are followed by growing waits. Errors that would come again are not retried:
those that name a mistake of the user, and those that came twice in a row at the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from mpt import errors
from mpt.launch.fault import USER_ERRORS, Fault

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0

NODE_FAILURES, NODE_MEMORY = 2, timedelta(hours=24)
"""A node with this many failures of its own in this time is used only if there is no other."""


@dataclass(frozen=True)
class History:
    """What must be remembered of earlier faults to decide on the next one."""

    max_restarts: int
    used: int = 0
    """Restarts since the last new checkpoint."""
    fruitless: int = 0
    """Faults in a row without a new step."""
    last: tuple[Any, ...] | None = None
    """Identity of the last fault."""
    last_node: str = ""
    """Where that was."""
    furthest: int = 0
    """The most steps finished so far."""
    committed: int = -1
    """Step of the newest checkpoint at the last fault."""

    @property
    def left(self) -> int:
        """Restarts left."""
        return self.max_restarts - self.used


@dataclass(frozen=True)
class Restart:
    """Start again after a wait."""

    after_s: float


@dataclass(frozen=True)
class GiveUp:
    """End the run."""

    exit_code: int
    why: str


def remember(history: History, fault: Fault, *, committed: int) -> History:
    """Return the history with one more fault, which costs a restart.

    Args:
        committed: step of the newest checkpoint now, -1 if there is none.
    """
    refilled = 0 if committed > history.committed else history.used
    progress = fault.step > history.furthest
    return replace(
        history,
        used=refilled + 1,
        fruitless=0 if progress else history.fruitless + 1,
        last=fault.identity,
        last_node=fault.node,
        furthest=max(history.furthest, fault.step),
        committed=max(history.committed, committed),
    )


def decide(
    history: History, fault: Fault, *, committed: int, stepped: bool, replaceable: bool
) -> tuple[History, Restart | GiveUp]:
    """Return what to do about a fault, and what to remember of it.

    Args:
        committed: step of the newest checkpoint now, -1 if there is none.
        stepped: whether the attempt had finished a step: then the program at least can run.
        replaceable: whether there are enough nodes without the one that it happened on.
    """
    now = remember(history, fault, committed=committed)
    if fault.exit_code in USER_ERRORS:
        return now, GiveUp(fault.exit_code, "the same would happen again")
    if fault.is_mistake and not stepped:
        return now, GiveUp(errors.EXIT_RESTARTS, "the same would happen again")
    again = fault.identity is not None and fault.identity == history.last
    # Twice on one node may be the node's fault, and that node is not used a third time.
    its_own = replaceable and fault.attributable and fault.node == history.last_node
    if again and not its_own:
        return now, GiveUp(errors.EXIT_RESTARTS, f"twice in a row at step {fault.step}")
    if now.used > history.max_restarts:
        why = f"no restarts are left of launch.max_restarts {history.max_restarts}"
        return replace(now, used=history.max_restarts), GiveUp(errors.EXIT_RESTARTS, why)
    return now, Restart(_wait_s(now.fruitless))


def unreliable_nodes(events: Iterable[Mapping[str, Any]], now: datetime) -> set[str]:
    """Return the nodes that have failed too often lately, by the record of events."""
    counts: dict[str, int] = {}
    for event in events:
        if event.get("event") != "fault" or not event.get("attributable"):
            continue
        with suppress(KeyError, ValueError, TypeError):  # not one that we wrote
            if now - datetime.fromisoformat(event["time"]) <= NODE_MEMORY:
                counts[event["node"]] = counts.get(event["node"], 0) + 1
    return {node for node, count in counts.items() if count >= NODE_FAILURES}


def _wait_s(fruitless: int) -> float:
    """No wait at first, nor while each attempt gets further."""
    if fruitless < 2:
        return 0.0
    return min(FIRST_WAIT_S * 2.0 ** (fruitless - 2), LONGEST_WAIT_S)
