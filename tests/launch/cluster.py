"""A cluster that is only played: a real coordinator, and nodes that do as they are told, or do not.

Time is a number that the test moves on; what the coordinator orders is handed out as it came.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpt.launch.attempt import next_attempt
from mpt.launch.coordinator import Coordinator
from mpt.launch.fault import Fault
from mpt.launch.gather import LAST_CALL_S
from mpt.launch.hang import RankState
from mpt.launch.pulse import Phase
from mpt.launch.wire import Message
from mpt.recipe.launch import Launch

TICK_S = 0.1
NPROC = 2


@dataclass
class Cluster:
    """Nodes around a coordinator."""

    run_dir: Path
    cfg: Launch
    past_events: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    committed: int = -1
    silent: set[str] = field(default_factory=set)
    """Nodes that are there and say nothing."""
    now: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.coordinator = Coordinator(
            self.run_dir,
            self.cfg,
            self,
            committed=lambda: self.committed,
            past_events=self.past_events,
            say=self.said.append,
        )

    def event(self, kind: str, /, **fields: Any) -> None:
        """Take in what the coordinator records."""
        self.events.append({"event": kind, **fields})

    def recorded(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def come(self, *names: str) -> None:
        """Nodes join, and are ready."""
        for name in names:
            self.coordinator.joined(name, f"host-{name}", self.now)
        self.ready(*names)

    def ready(self, *names: str) -> None:
        for name in names:
            self.report(name, "ready", nproc=NPROC, port=29500)

    def report(self, name: str, kind: str, **fields: Any) -> None:
        if kind == "stacks":
            fields.setdefault("attempt", next_attempt(self.run_dir) - 1)
        self.coordinator.heard(name, {"kind": kind, **fields}, self.now)

    def fail(self, name: str, *faults: Fault) -> None:
        self.report(name, "faults", faults=[asdict(fault) for fault in faults])

    def pass_time(self, seconds: float = TICK_S) -> None:
        """Let time pass; nodes beat, but for the silent ones. The last turn is at its end."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + TICK_S, end)
            for name in self.coordinator.members - self.silent:
                self.report(name, "beat", step=0)
            self.coordinator.turn(self.now)

    def orders(self, *kinds: str) -> list[tuple[str, Message]]:
        """Return, and take away, the orders given since the last call; of these kinds, if any."""
        orders, self.coordinator.orders = self.coordinator.orders, []
        return [(name, order) for name, order in orders if not kinds or order["kind"] in kinds]

    def ordered(self, *kinds: str) -> list[tuple[str, str]]:
        """Return (node, kind) of the orders given since the last call."""
        return [(name, order["kind"]) for name, order in self.orders(*kinds)]

    def start(self, step: int = 0) -> list[str]:
        """Let the attempt begin that is due, to the step; return its nodes in order of ranks."""
        self.pass_time()
        names = self.begin(self.orders("start"))
        if step:
            for name in names:
                self.report(name, "running", step=step)
        return names

    def begin(self, orders: Iterable[tuple[str, Message]]) -> list[str]:
        """Have nodes do as they are told; return them in order of ranks."""
        parts = sorted((order["assignment"]["node_rank"], name) for name, order in orders)
        for place, name in parts:
            self.report(name, "started", pids=[1000 + NPROC * place, 1001 + NPROC * place])
        return [name for _, name in parts]

    def end_with(self, *names: str, codes: Iterable[int]) -> None:
        """All workers of nodes end by themselves."""
        for name in names:
            self.report(name, "ended", codes=list(codes))
            self.ready(name)


def cluster(run_dir: Path, nnodes: int | str, **launch: Any) -> Cluster:
    return Cluster(run_dir, Launch(nproc=NPROC, nnodes=nnodes, **launch))


def running(run_dir: Path, nnodes: int | str, *names: str, **launch: Any) -> Cluster:
    """Return a cluster whose first attempt has finished five steps."""
    cl = cluster(run_dir, nnodes, **launch)
    cl.come(*names)
    cl.pass_time(LAST_CALL_S)
    assert cl.start(step=5) == list(names)[: cl.cfg.max_nodes]
    return cl


def killed(name: str, rank: int = 0, step: int = 0) -> Fault:
    return Fault(
        "killed", name, f"rank {rank} was killed by SIGKILL", rank, step, 0.1, -9, "SIGKILL"
    )


def failed(name: str, said: str, *, code: int = 1, step: int = 0) -> Fault:
    error = said.partition(":")[0]
    return Fault("failed", name, f"rank 0 failed: {said}", 0, step, 0.1, code, error, 1.0)


def peer_gone(name: str) -> Fault:
    return failed(name, "RuntimeError: Connection closed by peer [127.0.0.1]:33985")


def state(name: str, rank: int, phase: Phase, silent_s: float, step: int = 7) -> dict[str, Any]:
    """Return where a rank is, as its node reports it."""
    return asdict(RankState(rank, name, phase, step, silent_s, 0.1, 1, "S", ""))
