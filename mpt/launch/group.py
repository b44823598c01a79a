"""Which nodes make up an attempt, and which ranks are on which of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpt.launch.fault import Fault
from mpt.launch.hang import RankState
from mpt.launch.workers import Assignment

STACKS_S = 5.0
"""A node that has not sent the stacks of its ranks by then has none to send."""


@dataclass
class Member:
    """A node, as the coordinator knows it."""

    name: str
    host: str
    """Address that its ranks can be reached at."""
    heard: float
    """When it last said something."""
    nproc: int = 0
    port: int | None = None
    """Where its store would listen; None while it is not ready for a new attempt."""
    ended: list[int] | None = None
    """Exit codes of its workers, once all have ended by themselves."""
    pids: list[int] | None = None
    stacks: list[RankState] | None = None
    """Where its ranks are, if that was asked."""


@dataclass
class Attempt:
    """The attempt that runs now, or is being taken down."""

    number: int
    members: list[Member]
    started: float
    told: bool = False
    """Its start has been recorded."""
    faults: list[Fault] = field(default_factory=list)
    fault_at: float = 0.0
    asked_at: float | None = None
    """When its ranks were asked where they are."""
    step: int = 0
    """The most steps that a rank has finished."""
    stepped: bool = False
    """It has finished a step of its own."""

    def take_stacks(self, now: float) -> list[RankState] | None:
        """Return where all ranks are, once all nodes have said so or had the time to."""
        assert self.asked_at is not None, "nobody has asked"
        if any(m.stacks is None for m in self.members) and now - self.asked_at < STACKS_S:
            return None
        states = [state for member in self.members for state in member.stacks or []]
        self.asked_at = None
        for member in self.members:
            member.stacks = None
        return states

    def event(self) -> dict[str, Any]:
        """Return what the record of events says of its start."""
        pids = [pid for member in self.members for pid in member.pids or []]
        nodes = [member.name for member in self.members]
        return {"attempt": self.number, "world_size": len(pids), "nodes": nodes, "pids": pids}

    def add(self, faults: list[Fault], now: float) -> None:
        """Take in faults; the first of them is when the attempt failed."""
        if not self.faults:
            self.fault_at = now
        self.faults += faults


def choose(
    ready: Sequence[Member], last: Sequence[str], bad: Collection[str], *, fewest: int, most: int
) -> list[Member]:
    """Return the nodes of the next attempt, in the order of their ranks.

    Args:
        last: names of the nodes of the attempt before, in the order of their ranks.
        bad: names of nodes that are used only if there are not enough without them.
        fewest: nodes that an attempt needs.
        most: nodes that an attempt may have; the rest stands by.
    """
    good = [member for member in ready if member.name not in bad]
    usable = good if len(good) >= fewest else list(ready)
    usable.sort(key=lambda member: (member.name in bad, member.name not in last))
    # Ranks keep their places where they can: a copy in memory is of one rank's rows.
    stay = {member.name: member for member in usable[:most] if member.name in last}
    new = iter([member for member in usable[:most] if member.name not in last])
    placed = [stay.get(name) or next(new, None) for name in last]
    return [member for member in placed if member is not None] + list(new)


def assign(number: int, members: Sequence[Member]) -> list[Assignment]:
    """Return each node's part of attempt `number`; ranks are counted through, node after node."""
    world_size = sum(member.nproc for member in members)
    first, parts = members[0], []
    assert first.port is not None, "only nodes that are ready are chosen"
    first_rank = 0
    for node_rank, member in enumerate(members):
        place = (number, node_rank, first_rank, member.nproc, world_size)
        parts.append(Assignment(*place, first.host, first.port))
        first_rank += member.nproc
    return parts
