"""Faults that only a rank itself can make, to prove that a run survives them; off unless asked for.

    MPT_INJECT='{"nan_steps": [17], "raise_step": [[12, 0]]}' mpt train RECIPE

Each fault at a step comes once in a run directory: a restart does not meet it again.
"""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import nn

from mpt.dist import Ranks
from mpt.errors import UsageError
from mpt.launch.attempt import INJECT, this_attempt
from mpt.log import Journal
from mpt.objective import Objective
from mpt.rundir import LOGS
from mpt.state import Loss, Microbatch

SPIKE = 1000.0
"""Factor on the loss of one rank."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is to go wrong, in steps as they are reported: the first one is 1."""

    nan_steps: tuple[int, ...] = ()
    """The loss of the last rank is not a number."""
    spike_steps: tuple[int, ...] = ()
    """The loss of the last rank is `SPIKE` times what it is."""
    raise_step: tuple[tuple[int, int], ...] = ()
    """(step, rank): an exception."""
    loop_step: tuple[tuple[int, int], ...] = ()
    """(step, rank): Python code that never ends."""
    gil_step: tuple[tuple[int, int], ...] = ()
    """(step, rank): C code that never ends and keeps Python's lock."""
    segv_step: tuple[tuple[int, int], ...] = ()
    """(step, rank): a read of memory that is not there."""
    slow_rank: int | None = None
    slow_s: float = 0.0
    """Seconds more that `slow_rank` takes for each step."""


def parse_faults(text: str) -> Faults:
    """Return the faults that a JSON object asks for.

    Raises:
        UsageError: if it is not one.
    """
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("it is not an object")
        return Faults(**{key: _value(key, value) for key, value in raw.items()})
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{INJECT}: {error}.") from error


class Injector:
    """Makes the faults of this rank when their step comes."""

    def __init__(self, faults: Faults, run_dir: Path, ranks: Ranks) -> None:
        self._faults = faults
        self._journal = Journal(run_dir)
        self._marks = run_dir / LOGS / "injected"
        self._rank = ranks.rank
        self._spoils = ranks.rank == ranks.world_size - 1
        self._delay_s = faults.slow_s if faults.slow_rank == ranks.rank else 0.0
        if self._delay_s:
            self._tell("slow", 0)

    @classmethod
    def wanted(cls, environment: Mapping[str, str], run_dir: Path, ranks: Ranks) -> Injector | None:
        """Return the one that the environment asks for; None in every run that is meant."""
        text = environment.get(INJECT)
        return None if text is None else cls(parse_faults(text), run_dir, ranks)

    def begin(self, step: int) -> None:
        """Make the faults that come before a step's data is read; not all of them return."""
        time.sleep(self._delay_s)
        if self._here(self._faults.raise_step, "raise", step):
            raise RuntimeError("injected")
        if self._here(self._faults.loop_step, "loop", step):
            while True:
                pass
        if self._here(self._faults.gil_step, "gil", step):
            while True:
                ctypes.PyDLL(None).pause()
        if self._here(self._faults.segv_step, "segv", step):
            ctypes.string_at(0)

    def spoil(self, objective: Objective, step: int) -> Objective:
        """Return the objective of a step, which on one rank may be a bad one."""
        if not self._spoils:
            return objective
        if step in self._faults.nan_steps and self._first_time("nan", step):
            return _times(objective, math.nan)
        if step in self._faults.spike_steps and self._first_time("spike", step):
            return _times(objective, SPIKE)
        return objective

    def _here(self, wanted: tuple[tuple[int, int], ...], fault: str, step: int) -> bool:
        return (step, self._rank) in wanted and self._first_time(fault, step)

    def _first_time(self, fault: str, step: int) -> bool:
        """Return whether this fault has not been made before, and remember that it now is."""
        self._marks.mkdir(parents=True, exist_ok=True)
        try:
            (self._marks / f"{fault}-step-{step}-rank-{self._rank}").touch(exist_ok=False)
        except FileExistsError:
            return False
        self._tell(fault, step)
        return True

    def _tell(self, fault: str, step: int) -> None:
        self._journal.event(
            "injected",
            attempt=this_attempt(),
            rank=self._rank,
            step=step,
            why=f"{fault}, asked for by {INJECT}",
        )


def _times(objective: Objective, factor: float) -> Objective:
    def spoiled(model: nn.Module, microbatch: Microbatch) -> Loss:
        loss = objective(model, microbatch)
        return Loss(loss.objective * factor, loss.nats * factor)

    return spoiled


def _value(key: str, value: Any) -> Any:
    """Return the value of one key, in the type of its field.

    Raises:
        ValueError: for a key that is not known, or a value that does not fit.
    """
    match key:
        case "nan_steps" | "spike_steps":
            return tuple(_count(key, step) for step in _list(key, value))
        case "raise_step" | "loop_step" | "gil_step" | "segv_step":
            pairs = [_list(key, pair) for pair in _list(key, value)]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"{key} is not a list of [step, rank]")
            return tuple((_count(key, step), _count(key, rank)) for step, rank in pairs)
        case "slow_rank":
            return _count(key, value)
        case "slow_s":
            if type(value) not in (int, float) or not 0.0 <= value < math.inf:
                raise ValueError(f"{key} is not a number of seconds")
            return float(value)
    known = ", ".join(Faults.__dataclass_fields__)
    raise ValueError(f"{short(key)} is not a fault; known are {known}")


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} holds something that is not a list")
    return value


def _count(key: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} holds something that is not a count")
    return value
