"""The `launch:` section: how many workers, and how often they may be restarted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mpt.recipe.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Launch:
    nproc: int | Literal["auto"] = "auto"
    """Worker processes on this machine; auto is one per GPU, or one."""
    max_restarts: int = 10
    """Restarts after a dead worker before the run gives up."""

    stop_grace_s: int = 300
    """Seconds that workers have to finish a step and save after a stop signal."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if self.nproc != "auto" and self.nproc < 1:
            yield Problem("launch.nproc", f"{self.nproc} is not a positive count.")
        for key in ("max_restarts", "stop_grace_s"):
            if getattr(self, key) < 0:
                yield Problem(f"launch.{key}", f"{getattr(self, key)} is negative.")
