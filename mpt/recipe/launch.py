"""The `launch:` section: how many workers on how many nodes, and what is done when they fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mpt.recipe.problem import Problem

_NODES = re.compile(r"(\d+)(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Hang:
    """How long a rank may be silent before it counts as hung, by what it is doing."""

    min_s: float = 60.0
    """The least patience with a step; never less than `factor` x the slowest recent step."""
    factor: float = 5.0
    """Times the slowest recent step, save or evaluation batch of this run."""
    start_s: float = 900.0
    """From the start of a worker to its first step: imports, building, loading a checkpoint."""
    first_step_s: float = 1800.0
    """The first step of a worker, which compiles."""
    save_s: float = 900.0
    """The part of a save that training waits for; at least this."""
    eval_s: float = 300.0
    """One batch of an evaluation; at least this."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        for key in ("min_s", "factor", "start_s", "first_step_s", "save_s", "eval_s"):
            if not getattr(self, key) > 0.0:
                yield Problem(f"launch.hang.{key}", f"{getattr(self, key)} is not positive.")


@dataclass(frozen=True, kw_only=True)
class Launch:
    nproc: int | Literal["auto"] = "auto"
    """Worker processes on each node; auto is one per GPU, or one."""
    nnodes: int | str = 1
    """Nodes that train together: 4, or "3:4" to go on with three when one is lost."""
    max_restarts: int = 10
    """Restarts after faults before the run gives up; each new checkpoint gives them all back."""
    stop_grace_s: int = 300
    """Seconds that workers have to finish a step and save after a stop signal."""
    join_s: float = 600.0
    """Seconds to wait for enough nodes, at the start and after one was lost."""
    hang: Hang = field(default_factory=Hang)
    """When a silent rank counts as hung."""

    @property
    def min_nodes(self) -> int:
        """The fewest nodes that may train."""
        return self._nodes()[0]

    @property
    def max_nodes(self) -> int:
        """The most nodes that train together; others that come stand by as spares."""
        return self._nodes()[1]

    def _nodes(self) -> tuple[int, int]:
        match = _NODES.fullmatch(str(self.nnodes))
        assert match is not None, "checked by problems()"
        return int(match[1]), int(match[2] or match[1])

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if self.nproc != "auto" and self.nproc < 1:
            yield Problem("launch.nproc", f"{self.nproc} is not a positive count.")
        match = _NODES.fullmatch(str(self.nnodes))
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            yield Problem(
                "launch.nnodes", f"{self.nnodes!r} is not a count of nodes.", 'use 4, or "3:4".'
            )
        for key in ("max_restarts", "stop_grace_s", "join_s"):
            if getattr(self, key) < 0:
                yield Problem(f"launch.{key}", f"{getattr(self, key)} is negative.")
        yield from self.hang.problems()
