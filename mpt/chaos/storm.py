"""Training under faults: starts the nodes, strikes when a step has come, waits for the repair."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mpt.chaos.nodes import PATIENCE_S, Nodes
from mpt.chaos.plan import Kind, Planned
from mpt.chaos.tail import Tail
from mpt.checkpoint.layout import committed, step_of
from mpt.errors import EXIT_DONE, EXIT_PREEMPTED, MptError
from mpt.rundir import CHECKPOINTS, EVENTS, METRICS

LOOK_S = 0.02


@dataclass(frozen=True)
class Struck:
    """A fault that was made."""

    kind: Kind
    step: int
    """Steps finished when it struck."""
    at: float
    """`time.time()`."""
    attempt: int
    """That it struck."""
    target: str
    """What was hit, for a person."""
    restarts: bool = True
    """Whether a new attempt has to follow."""


class Storm:
    """One run, and what happens to it."""

    def __init__(
        self, nodes: Nodes, run_dir: Path, *, seed: int, tell: Callable[[str], None]
    ) -> None:
        self._nodes, self._run_dir, self._tell = nodes, run_dir, tell
        self._dice = random.Random(seed)
        self.metrics = Tail(run_dir / METRICS)
        self.events = Tail(run_dir / EVENTS)
        self.struck: list[Struck] = []
        self._step = 0
        self._attempt = -1
        self._pids: list[int] = []
        self._last_news = time.monotonic()

    def rage(self, planned: Sequence[Planned]) -> None:
        """Train to the end, and strike at each planned step.

        Raises:
            MptError: if the run ends otherwise than done, or stands still.
        """
        self._nodes.start()
        for fault in planned:
            if fault.kind == "nan":
                continue  # the run was told of it when it was started
            # Not before the last one is repaired: each is to be measured by itself.
            if not self._await(partial(self._is_time, fault.step)):
                break
            if self._nodes.running():
                self._strike(fault.kind)
        self._await(lambda: False)
        codes = self._nodes.wait()
        if any(code != EXIT_DONE for code in codes):
            raise MptError(f"{self._run_dir}: ended with exit codes {codes}, not with {EXIT_DONE}.")

    def _is_time(self, step: int) -> bool:
        return self._step >= step and self._repaired()

    def _await(self, claim: Callable[[], bool]) -> bool:
        """Return True once the claim holds, False if every node has ended before."""
        while True:
            self._look()
            if claim():
                return True
            if not self._nodes.running():
                self._look()
                return claim()
            if time.monotonic() - self._last_news > PATIENCE_S:
                raise MptError(f"{self._run_dir}: no new step for {PATIENCE_S:g} s.")
            time.sleep(LOOK_S)

    def _look(self) -> None:
        for record in self.metrics.look():
            if "loss" in record:
                self._step = int(record["step"])
                self._last_news = time.monotonic()
        for event in self.events.look():
            if event.get("event") == "attempt_started":
                self._attempt, self._pids = int(event["attempt"]), list(event["pids"])

    def _repaired(self) -> bool:
        """Whether a step has been finished since the last fault, by whoever followed it."""
        if not self.struck:
            return True
        last = self.struck[-1]
        lines = (r for r in reversed(self.metrics.records) if "loss" in r)
        newest = next(lines, None)
        return newest is not None and int(newest.get("attempt", -1)) > last.attempt

    def _strike(self, kind: Kind) -> None:
        match kind:
            case "rank kill":
                self._hit_rank(kind, signal.SIGKILL)
            case "rank segfault":
                self._hit_rank(kind, signal.SIGSEGV)
            case "rank hang":
                self._hit_rank(kind, signal.SIGSTOP)
            case "node kill" | "leader kill":
                self._kill_node(kind)
            case "preemption":
                self._preempt()
            case "torn save":
                self._tear_save()
            case "corrupt checkpoint":
                self._corrupt()

    def _note(self, kind: Kind, target: str) -> None:
        self.struck.append(Struck(kind, self._step, time.time(), self._attempt, target))
        self._tell(f"step {self._step:,}: {kind}: {target}")

    def _hit_rank(self, kind: Kind, number: signal.Signals) -> None:
        rank = self._dice.randrange(len(self._pids))
        self._note(kind, f"rank {rank}")
        with suppress(ProcessLookupError):
            os.kill(self._pids[rank], number)

    def _kill_node(self, kind: Kind) -> None:
        """Kill a supervisor, and with it its ranks; a new node comes, as in a cluster."""
        leader = self._nodes.leader()
        running = self._nodes.running()
        others = [i for i in running if i != leader]
        victim = leader if kind == "leader kill" or not others else self._dice.choice(others)
        if victim is None:
            victim = running[0]
        self._note(kind, self._nodes.name(victim))
        self._nodes.signal(victim, signal.SIGKILL)
        self._await(lambda: victim not in self._nodes.running())
        self._nodes.start()

    def _preempt(self) -> None:
        victim = self._dice.choice(self._nodes.running())
        self._note("preemption", f"SIGTERM to {self._nodes.name(victim)}")
        self._nodes.signal(victim, signal.SIGTERM)
        codes = self._nodes.wait()
        if any(code != EXIT_PREEMPTED for code in codes):
            raise MptError(f"{self._run_dir}: SIGTERM ended it with {codes}, not {EXIT_PREEMPTED}.")
        self._nodes.start()

    def _tear_save(self) -> None:
        """Kill the rank that commits while a checkpoint is half-written."""
        checkpoints = self._run_dir / CHECKPOINTS
        if not self._await(lambda: any(checkpoints.glob("*.partial/*"))):
            return
        (torn, *_) = [*checkpoints.glob("*.partial"), checkpoints]
        self._note("torn save", f"rank 0 in {torn.name.partition('.')[0]}")
        with suppress(ProcessLookupError):
            os.kill(self._pids[0], signal.SIGKILL)

    def _corrupt(self) -> None:
        """Flip a bit of the newest checkpoint while nobody holds a copy of the state."""
        self._await(lambda: len(committed(self._run_dir / CHECKPOINTS)) > 1)
        newest = committed(self._run_dir / CHECKPOINTS)[0]
        self._note("corrupt checkpoint", f"{newest.name}, all nodes killed")
        for i in self._nodes.running():
            self._nodes.signal(i, signal.SIGKILL)
        self._nodes.wait()
        # It may have been followed by another in the meantime: the newest is what is resumed from.
        newest = committed(self._run_dir / CHECKPOINTS)[0]
        file = max(newest.glob("weights-*"), key=lambda path: path.stat().st_size)
        with file.open("r+b") as content:
            content.seek(-1, os.SEEK_END)
            last = content.read(1)[0]
            content.seek(-1, os.SEEK_END)
            content.write(bytes([last ^ 1]))
        self._tell(f"flipped a bit of the checkpoint of step {step_of(newest):,}")
        self._nodes.start()
