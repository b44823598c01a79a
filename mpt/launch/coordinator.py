"""The one who decides: which nodes train together, what a fault means, when the run is over.

A state machine without sockets or processes: what nodes say goes in through `joined`, `left` and
`heard`, time goes in through `turn`, orders come out of `orders`. One supervisor runs it beside its
own node; when that one is lost another node begins a new one, and the nodes come to it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpt import errors
from mpt.launch.attempt import claim_attempt, next_attempt
from mpt.launch.decide import GiveUp, History, decide, remember, unreliable_nodes
from mpt.launch.ending import End, gave_up, message, stopped, unsaved
from mpt.launch.fault import Fault, cause, hang_fault, lost_node
from mpt.launch.gather import DISK_S, Gathering, TooFewNodes
from mpt.launch.group import Attempt, Member, assign, choose
from mpt.launch.hang import RankState
from mpt.launch.run import Record
from mpt.launch.wire import Message
from mpt.log import utc_now
from mpt.recipe.launch import Launch

NODE_SILENT_S = 4.0
"""A node that says nothing for this long is lost."""

SETTLE_S = 1.0
"""A rank that lost its peer may be heard before the peer's own node is: wait for the cause."""


class Coordinator:
    """Decides for one run, from taking the lead until its end."""

    def __init__(
        self,
        run_dir: Path,
        cfg: Launch,
        record: Record,
        *,
        committed: Callable[[], int],
        past_events: Sequence[dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        """Begin with no nodes.

        Args:
            committed: returns the step of the newest checkpoint, -1 if there is none.
            past_events: of the run, for what they say about nodes.
            say: tells the person a sentence.
        """
        self._run_dir, self._cfg, self._record = run_dir, cfg, record
        self._committed, self._say = committed, say
        self._past = [event for event in past_events if event.get("event") == "fault"]
        self._members: dict[str, Member] = {}
        self._attempt: Attempt | None = None
        self._history = History(cfg.max_restarts, committed=committed())
        self._gathering = Gathering(cfg, time.monotonic())
        self._recovering: float | None = None
        self._last_group: list[str] = []
        self._drop_memory = False
        self._stopping = 0
        self._stop_deadline = float("inf")
        self._regrouping = False
        self.orders: list[tuple[str, Message]] = []
        """(node, order), to be delivered."""
        self.end: End | None = None
        """Set once the run is over; `end` has then been ordered of every node."""

    @property
    def members(self) -> set[str]:
        """Names of the nodes that are there."""
        return set(self._members)

    def joined(self, name: str, host: str, now: float) -> None:
        """A node has come."""
        self._members[name] = Member(name, host, now)

    def left(self, name: str, why: str, now: float) -> None:
        """A node is gone."""
        member = self._members.pop(name, None)
        if member is None:
            return
        attempt = self._attempt
        if attempt is None or member not in attempt.members or member.ended is not None:
            self._say(f"node {name} left: {why}.")
            return
        attempt.add([lost_node(name, why, attempt.step, now - member.heard)], now)

    def is_forsaken(self, now: float) -> bool:
        """Whether all other nodes have been gone for long: then they may have each other."""
        return self._attempt is None and self._gathering.is_forsaken(len(self._members), now)

    def inherit(self, fault: Fault) -> None:
        """Take in, once, what became of the node that led before; it needs no decision."""
        if self._last_group or self._recovering:
            return
        self._history = remember(self._history, fault, committed=self._committed())
        self._record_fault(next_attempt(self._run_dir) - 1, fault)
        self._recovering = time.monotonic()

    def heard(self, name: str, report: Message, now: float) -> None:
        """A node has reported something."""
        member = self._members.get(name)
        if member is None:
            return
        member.heard = now
        attempt = self._attempt if self._attempt and member in self._attempt.members else None
        match report["kind"]:
            case "ready":
                member.nproc, member.port = int(report["nproc"]), int(report["port"])
            case "stop":
                self.stop(int(report["number"]), now)
            case "beat" if attempt:
                attempt.step = max(attempt.step, int(report["step"]))
            case "running" if attempt:
                attempt.step, attempt.stepped = max(attempt.step, int(report["step"])), True
                self._recovered(attempt, now)
            case "started" if attempt:
                member.pids = [int(pid) for pid in report["pids"]]
                self._tell_started(attempt)
            case "faults" if attempt:
                attempt.add([Fault(**fault) for fault in report["faults"]], now)
            case "hung" if attempt and attempt.asked_at is None and not attempt.faults:
                attempt.asked_at = now
                self._order_all(attempt, {"kind": "dump", "attempt": attempt.number})
            case "stacks" if attempt and attempt.asked_at and attempt.number == report["attempt"]:
                member.stacks = [RankState(**state) for state in report["ranks"]]
            case "ended" if attempt:
                member.ended = [int(code) for code in report["codes"]]

    def stop(self, number: int, now: float) -> None:
        """A node was asked to stop by a signal: all of them save and end."""
        if self._attempt is None:
            self._record.event("stopped", signal=number, step=max(self._committed(), 0))
            self.finish(stopped(number))
            return
        if number == self._stopping:  # of all nodes at a time, as a Ctrl-C under srun is
            return
        if not self._stopping:
            name = signal.Signals(number).name
            self._record.event("stopping", attempt=self._attempt.number, signal=name)
            again = "; once more ends it now" if number == signal.SIGINT else ""
            self._say(f"{name}: finishing the step and saving{again}.")
        self._regrouping = False
        self._stopping = number
        self._stop_deadline = min(self._stop_deadline, now + self._cfg.stop_grace_s)
        self._order_all(self._attempt, {"kind": "signal", "number": number})

    def turn(self, now: float) -> None:
        """Decide what is due."""
        if self.end is not None:
            return
        for member in list(self._members.values()):
            if now - member.heard > NODE_SILENT_S:
                self.left(member.name, f"silent for {now - member.heard:.1f} s", now)
        attempt = self._attempt
        if attempt is None:
            self._gather(now)
        elif attempt.faults:
            self._settle(attempt, now)
        elif attempt.asked_at is not None:
            self._explain_hang(attempt, now)
        elif all(member.ended is not None for member in attempt.members):
            self._all_ended(attempt, now)
        elif now > self._stop_deadline:
            self.finish(unsaved(self._stopping))
        elif self._could_grow(attempt):
            self._regrouping = True
            self._record.event("regrouping", attempt=attempt.number)
            self._say("another node has come: saving, to go on with it.")
            self._order_all(attempt, {"kind": "signal", "number": int(signal.SIGUSR1)})

    def _gather(self, now: float) -> None:
        try:
            ready = self._gathering.ready(self._members.values(), now)
        except TooFewNodes as few:
            self._give_up(errors.EXIT_RESTARTS, str(few))
            return
        if ready:
            self._start(ready, now)

    def _start(self, ready: list[Member], now: float) -> None:
        bad = unreliable_nodes(self._past, datetime.now(UTC))
        fewest, most = self._cfg.min_nodes, self._cfg.max_nodes
        members = choose(ready, self._last_group, bad, fewest=fewest, most=most)
        if unused := {member.name for member in ready} & bad - {m.name for m in members}:
            self._say(f"node {', '.join(sorted(unused))} failed too often lately: not used.")
        try:
            number = claim_attempt(self._run_dir)
        except OSError as error:  # a full disk may not stay full
            self._say(f"{error.filename}: {error.strerror}; trying again in {DISK_S:.0f} s.")
            self._gathering.not_before = now + DISK_S
            return
        # A node that was away has copies of another branch.
        keep = set() if self._drop_memory else set(self._last_group)
        self._drop_memory = False
        self._attempt = Attempt(number, members, now)
        self._last_group = [member.name for member in members]
        self._regrouping = False
        for member, assignment in zip(members, assign(number, members), strict=True):
            member.port = member.ended = member.pids = member.stacks = None
            order = {"kind": "start", "assignment": asdict(assignment)}
            self.orders.append((member.name, {**order, "keep_memory": member.name in keep}))

    def _tell_started(self, attempt: Attempt) -> None:
        if not attempt.told and all(member.pids is not None for member in attempt.members):
            attempt.told = True
            self._record.event("attempt_started", **attempt.event())

    def _recovered(self, attempt: Attempt, now: float) -> None:
        if self._recovering is None:
            return
        took = round(now - self._recovering, 3)
        self._recovering = None
        self._record.event("recovered", attempt=attempt.number, step=attempt.step, restart_s=took)

    def _could_grow(self, attempt: Attempt) -> bool:
        """Whether a node stands by while the attempt has fewer than it may have."""
        if self._stopping or self._regrouping or len(attempt.members) >= self._cfg.max_nodes:
            return False
        bad = unreliable_nodes(self._past, datetime.now(UTC))
        others = [m for m in self._members.values() if m not in attempt.members]
        spare = any(m.port is not None and m.name not in bad for m in others)
        return spare and attempt.told and self._recovering is None and attempt.step > 0

    def _settle(self, attempt: Attempt, now: float) -> None:
        """Decide on a fault: at once if it stands for itself, else when its cause is known."""
        alone = len(attempt.members) == 1 and len(self._members) <= 1
        unexplained = all(fault.is_consequence for fault in attempt.faults)
        if alone or not unexplained or now - attempt.fault_at >= SETTLE_S:
            self._decide(attempt, cause(attempt.faults), now)

    def _explain_hang(self, attempt: Attempt, now: float) -> None:
        """Turn the stacks of all ranks into a fault with a reason, if it is a hang at all."""
        states = attempt.take_stacks(now)
        if states is not None and (fault := hang_fault(states, self._cfg.hang)):
            self._decide(attempt, fault, now)

    def _decide(self, attempt: Attempt, fault: Fault, now: float) -> None:
        self._order_all(attempt, {"kind": "kill"})
        self._attempt = None
        self._gathering = Gathering(self._cfg, now, again=True)
        if self._stopping:
            self._record_fault(attempt.number, fault)
            self.finish(unsaved(self._stopping, fault))
            return
        replaceable = len(self.members - {fault.node}) >= self._cfg.min_nodes
        saved, stepped = self._committed(), attempt.stepped
        self._history, decision = decide(
            self._history, fault, committed=saved, stepped=stepped, replaceable=replaceable
        )
        user_error = isinstance(decision, GiveUp) and decision.exit_code != errors.EXIT_RESTARTS
        if user_error:  # what a worker says in a person's words needs no others
            self._record.event("gave_up", why=message(fault), exit_code=fault.exit_code)
            self.finish(End(fault.exit_code, message(fault)))
            return
        self._record_fault(attempt.number, fault)
        if isinstance(decision, GiveUp):
            self._give_up(errors.EXIT_RESTARTS, f"{fault.why}; {decision.why}")
            return
        self._gathering.not_before = now + decision.after_s
        self._recovering = self._recovering or attempt.fault_at or now
        later = f" in {decision.after_s:.0f} s" if decision.after_s else ""
        self._say(f"{fault.why}; restarting{later} ({self._history.left} restarts left).")

    def _record_fault(self, attempt: int, fault: Fault) -> None:
        left = max(self._history.left, 0)
        event = {"attempt": attempt, **fault.event(), "restarts_left": left}
        self._record.event("fault", **event)
        self._past.append({"event": "fault", "time": utc_now(), **event})

    def _all_ended(self, attempt: Attempt, now: float) -> None:
        """Every worker has ended by itself: done, stopped, or asking to start again."""
        codes = {code for member in attempt.members for code in member.ended or []}
        self._attempt = None
        self._gathering = Gathering(self._cfg, now, again=not self._regrouping)
        self._drop_memory = errors.EXIT_ROLL_BACK in codes
        if self._drop_memory and self._stopping:
            self.stop(self._stopping, now)
        elif not self._drop_memory and not (self._regrouping and errors.EXIT_PREEMPTED in codes):
            self.finish(End(max(codes)))

    def _give_up(self, code: int, why: str) -> None:
        self._record.event("gave_up", why=why)
        self.finish(gave_up(self._run_dir, code, why, started=bool(self._last_group)))

    def finish(self, end: End) -> None:
        """End the run on every node."""
        self.end = end
        self.orders += [(name, end.order()) for name in self._members]

    def _order_all(self, attempt: Attempt, order: Message) -> None:
        self.orders += [(member.name, order) for member in attempt.members]
