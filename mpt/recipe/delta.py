"""The `prepare.delta:` section: which version and rows of a Delta Lake table are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from mpt.recipe.predicate import parse_predicate
from mpt.recipe.problem import Problem

DELTA_PREFIX = "delta:"
"""Before a path or URL, says that a Delta Lake table is there."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Which version and rows of a Delta Lake table. Without a version and a time, it is the one
    that is newest when the work begins; a call that goes on after a kill keeps to it."""

    version: int | None = None
    """Number of the version."""
    timestamp: str | None = None
    """The version at that time, such as 2026-01-31T12:00:00Z."""
    predicate: str | None = None
    """Only rows for which this holds, such as `lang = 'en' AND n_words > 50`: columns compared with
    values by = != < <= > >= IS NULL, IN (...), LIKE '...'; AND, OR, NOT and parentheses."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if self.version is not None and self.timestamp is not None:
            yield Problem("prepare.delta", "has a version and a timestamp.", "keep one of them.")
        if self.version is not None and self.version < 0:
            yield Problem("prepare.delta.version", f"{self.version} is negative.")
        if self.timestamp is not None:
            try:
                datetime.fromisoformat(self.timestamp)
            except ValueError:
                yield Problem(
                    "prepare.delta.timestamp",
                    f"{self.timestamp!r} is no time.",
                    "write it as 2026-01-31T12:00:00Z.",
                )
        if self.predicate is not None:
            try:
                parse_predicate(self.predicate)
            except ValueError as error:
                yield Problem("prepare.delta.predicate", f"{error}.")
