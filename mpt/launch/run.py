"""What a supervisor needs to know of the run it takes part in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mpt.launch.place import Place
from mpt.recipe.launch import Launch


@dataclass(frozen=True)
class Run:
    """One run, as a supervisor sees it."""

    run_dir: Path
    cfg: Launch
    identity: str
    """Hash of the recipe: nodes that were given another must not train together."""
    place: Place
    prepare: Callable[[], None]
    """Makes run directory and data ready; called by the one that leads, before it does."""
    committed: Callable[[], int]
    """Step of the newest checkpoint, -1 if there is none."""
    is_done: Callable[[], bool]
    """Whether the last step of the recipe has been taken and saved."""


class Record(Protocol):
    """Where events are written: `mpt.log.Journal`."""

    def event(self, kind: str, /, **fields: Any) -> None: ...
