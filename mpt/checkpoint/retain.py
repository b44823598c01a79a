"""Which checkpoints a run keeps: a pure function of their steps."""

from __future__ import annotations

from collections.abc import Iterable


def to_delete(steps: Iterable[int], keep: int) -> list[int]:
    """Return the steps whose checkpoints retention gives up: all but the newest `keep`."""
    return sorted(steps, reverse=True)[keep:]
