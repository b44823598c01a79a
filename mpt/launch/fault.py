"""What can go wrong with a rank or a node, and which of several faults the others follow from."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpt import errors
from mpt.launch.diagnosis import diagnose, stuck_ranks
from mpt.launch.hang import RankState, hung
from mpt.recipe.launch import Hang

ENDS = {errors.EXIT_DONE, errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED, errors.EXIT_ROLL_BACK}
"""Exit codes of workers that are no faults."""

USER_ERRORS = {
    errors.EXIT_USAGE,
    errors.EXIT_DATA,
    errors.EXIT_CHECKPOINT,
    errors.EXIT_DIVERGED,
}
"""Exit codes of workers that a restart cannot mend."""

MISTAKES = {
    "AssertionError",
    "AttributeError",
    "ImportError",
    "IndexError",
    "KeyError",
    "ModuleNotFoundError",
    "NameError",
    "NotImplementedError",
    "SyntaxError",
    "TypeError",
    "UnboundLocalError",
    "ValueError",
    "ZeroDivisionError",
}
"""Exceptions that say what is wrong with a program or its input: the same again ends the same."""

_SHAPES = re.compile(
    r"shapes? cannot be|size mismatch|must match the size|mat1 and mat2|invalid for input of size"
    r"|view size is not compatible"
)
"""What torch's RuntimeError says when shapes do not fit."""

Kind = Literal["killed", "failed", "hang", "node_lost"]


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong; of several at a time, the one that the others follow from."""

    kind: Kind
    node: str
    why: str
    """A sentence."""
    rank: int | None = None
    step: int = 0
    """Steps finished."""
    detected_s: float | None = None
    """Seconds from the rank's last sign of life until this was seen."""
    exit_code: int = 0
    error: str = ""
    """Class of the exception, or name of the signal."""
    time: float = 0.0
    """`time.time()` of the end, as far as it is known."""

    @property
    def is_mistake(self) -> bool:
        """Whether the same would happen again, whoever tries."""
        if self.exit_code in USER_ERRORS:
            return True
        return self.error in MISTAKES or (
            self.error == "RuntimeError" and _SHAPES.search(self.why) is not None
        )

    @property
    def is_consequence(self) -> bool:
        """Whether this is how a rank ends when a peer of it is gone."""
        gone = self.kind == "failed" and _PEER_GONE.search(self.why) is not None
        return gone and not self.is_mistake

    @property
    def attributable(self) -> bool:
        """Whether the node it happened on may be at fault."""
        nobody = self.kind == "hang" and self.rank is None
        return not (nobody or self.is_mistake or self.is_consequence)

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """What makes two faults the same; None for what comes from outside, as a kill does."""
        if (
            self.is_consequence
            or self.kind == "node_lost"
            or (self.kind == "killed" and self.error in _FROM_OUTSIDE)
        ):
            return None
        return (self.kind, self.error, self.step, _without_numbers(self.why))

    def event(self) -> dict[str, Any]:
        """Return what the record of events says of it."""
        kept = ("kind", "rank", "node", "step", "detected_s", "why")
        return {key: getattr(self, key) for key in kept} | {"attributable": self.attributable}


_PEER_GONE = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|socket ?(timeout|progress)"
    r"|client socket has|remote process exited|DistStoreError|TCPStore|recvValue|sendBytes",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say when the other side is gone; not every word of NCCL's."""

_FROM_OUTSIDE = {"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"}


def cause(faults: Iterable[Fault]) -> Fault:
    """Return the one that the others follow from.

    Ranks whose peer is gone fail with errors of their own, a little later: a mistake comes before
    a signal, a signal before an error, and the earlier error before the later one.
    """

    def order(fault: Fault) -> tuple[int, float]:
        kinds = {"node_lost": 1, "killed": 2, "hang": 3, "failed": 4}
        first = 0 if fault.is_mistake else kinds[fault.kind]
        return (first + 10 * fault.is_consequence, fault.time)

    return min(faults, key=order)


def lost_node(node: str, why: str, step: int, silent_s: float) -> Fault:
    """Return the fault of a node that is gone."""
    return Fault(
        "node_lost",
        node,
        f"node {node} is lost: {why}",
        step=step,
        detected_s=round(silent_s, 3),
        time=time.time() - silent_s,
    )


def hang_fault(states: Sequence[RankState], cfg: Hang) -> Fault | None:
    """Return the fault of ranks that hang, in words; None if all of them have an excuse.

    It is that of a rank which waits for nobody, if there is one. If all wait for each other, no
    rank and no node is to blame.
    """
    overdue = set(hung(states, cfg))
    if not overdue:
        return None
    stuck = set(stuck_ranks(states))
    blamed = [state for state in states if state.rank in (stuck & overdue or stuck or overdue)]
    worst = max(blamed, key=lambda state: state.silent_s)
    return Fault(
        "hang",
        worst.node,
        f"{diagnose(states, cfg)} (stacks: rank-*.stacks in the attempt's logs)",
        worst.rank if stuck else None,
        worst.step,
        worst.silent_s,
        error="hang",
        time=time.time(),
    )


def _without_numbers(text: str) -> str:
    """Addresses, ports and pids differ between two that are the same."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)
