"""How a run ends: the exit code, and what a person is told."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt import errors
from mpt.launch.fault import Fault


@dataclass(frozen=True)
class End:
    """The end of a run, the same on every node."""

    exit_code: int
    why: str = ""
    """For the person; empty if there is nothing to explain."""

    def order(self) -> dict[str, Any]:
        """Return what the nodes are told."""
        return {"kind": "end", "exit_code": self.exit_code, "why": self.why}


def stopped(number: int) -> End:
    """Return the end of a run that was asked to stop by a signal, with nothing left to save."""
    interrupted = number == signal.SIGINT
    return End(errors.EXIT_INTERRUPTED if interrupted else errors.EXIT_PREEMPTED)


def gave_up(run_dir: Path, code: int, why: str, *, started: bool) -> End:
    """Return the end of a run that cannot go on by itself."""
    where = f"; see {run_dir / 'logs'}" if started else ""
    return End(code, f"{why}{where}. Once the cause is mended: mpt resume {run_dir}")


def unsaved(stopping: int, fault: Fault | None = None) -> End:
    """Return the end of a run that was asked to stop, and could not save before it did.

    Args:
        stopping: the signal that asked.
        fault: what came in between; None if the time was up.
    """
    if fault is not None and fault.is_mistake and fault.exit_code > 0:
        return End(fault.exit_code, message(fault))
    interrupted = stopping == signal.SIGINT
    code = errors.EXIT_INTERRUPTED if interrupted else errors.EXIT_TERMINATED
    return End(code, f"not saved: {fault.why}" if fault else "not saved within launch.stop_grace_s")


def message(fault: Fault) -> str:
    """Return what a worker said of a mistake, without who said it."""
    _, found, said = fault.why.partition(f"{fault.error}: ")
    return said if found and fault.error else fault.why
