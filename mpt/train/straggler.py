"""Which ranks hold up the others: pure arithmetic on the time of each rank's own work in a step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = 12
"""Steps after which ranks compare."""

WINDOWS = 3
"""Windows in a row in which a rank must be slow to be named, or not slow to be cleared: it is
named after 44 slow steps at most, and a neighbour's burst of work is over by then."""

LEAST_SHARE = 0.05
LEAST_S = 0.01
"""What counts as slow: more than this share of the others' time, and more than this."""


@dataclass(frozen=True)
class Busy:
    """Seconds of a rank's own work in the steps of one window: a quarter took less than `low`,
    half less than `middle`, a quarter more than `high`."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Slow:
    """A rank that others wait for."""

    rank: int
    busy_s: float
    others_s: float

    @property
    def excess_s(self) -> float:
        return self.busy_s - self.others_s


def slow_ranks(busy: Sequence[Busy]) -> list[Slow]:
    """Return the ranks whose usual step is slow for the others, and whose quick one is still not
    quick for them.

    Both hold for a rank that is slower in every step. They do not for one that was slow in some,
    as all of them are on a machine that does something else besides.
    """
    found = []
    for rank, mine in enumerate(busy):
        others = [other for i, other in enumerate(busy) if i != rank and not math.isnan(other.low)]
        if not others:
            continue
        middle = statistics.median(other.middle for other in others)
        high = statistics.median(other.high for other in others)
        margin = max(LEAST_SHARE * middle, LEAST_S)
        if mine.middle - high > margin and mine.low - middle > margin:
            found.append(Slow(rank, mine.middle, middle))
    return found


@dataclass(frozen=True)
class Suspicion:
    """What is remembered of windows: how often in a row each rank was slow, or was not."""

    slow: dict[int, int] = field(default_factory=dict)
    well: dict[int, int] = field(default_factory=dict)
    """Of the named."""

    def after(self, found: Sequence[Slow]) -> tuple[Suspicion, list[Slow], list[int]]:
        """Return what is remembered after one more window, the newly named, and the cleared."""
        ranks = {slow.rank for slow in found}
        slow = {rank: self.slow.get(rank, 0) + 1 for rank in ranks}
        well = {rank: 0 if rank in ranks else n + 1 for rank, n in self.well.items()}
        cleared = sorted(rank for rank, n in well.items() if n >= WINDOWS)
        named = [s for s in found if slow[s.rank] >= WINDOWS and s.rank not in well]
        well = {rank: n for rank, n in well.items() if rank not in cleared}
        well |= {s.rank: 0 for s in named}
        return Suspicion(slow, well), named, cleared
