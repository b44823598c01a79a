"""Which fault comes when: a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "rank kill",
    "rank segfault",
    "rank hang",
    "node kill",
    "leader kill",
    "preemption",
    "torn save",
    "corrupt checkpoint",
    "nan",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

EARLIEST, LATEST = 0.1, 0.9
"""Fractions of the run between which faults come: after a first checkpoint, and not at the end."""


@dataclass(frozen=True)
class Planned:
    """A fault that is to come."""

    step: int
    """Steps finished when it strikes, or a little later."""
    kind: Kind


def plan(kinds: Sequence[Kind], n_faults: int, *, steps: int, seed: int) -> list[Planned]:
    """Return `n_faults` faults over a run of `steps`, each kind as often as the others.

    Steps are spread evenly and moved at random within their part, so that there is time to get
    over one before the next.

    Raises:
        ValueError: if the run is too short for so many.
    """
    first, last = int(steps * EARLIEST), int(steps * LATEST)
    width = (last - first) / max(n_faults, 1)
    if width < 1:
        raise ValueError(f"{steps} steps are too few for {n_faults} faults")
    dice = random.Random(seed)
    drawn: list[Kind] = []
    while len(drawn) < n_faults:
        drawn += dice.sample(list(kinds), len(kinds))
    return [
        # At most half a part late: the rest is for getting over it.
        Planned(first + int((i + dice.random() / 2) * width), kind)
        for i, kind in enumerate(drawn[:n_faults])
    ]
