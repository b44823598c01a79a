"""Which stream stands at which position, and how much of it came before: arithmetic, no state.

A mixture is weights of streams, which may change at given positions. Whatever the changes, the
samples of a stream are numbered 0, 1, 2, ... in the order in which they come up: a change of
mixture neither skips nor repeats any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

SHARE_BITS = 32
"""Shares are rounded to multiples of 2**-32."""


@dataclass(frozen=True)
class Phase:
    """What holds from a position on, until the next phase begins."""

    start: int
    """The first position; 0 for the first phase."""
    weights: tuple[float, ...]
    """Share of the samples per stream, relative to the others; 0 leaves a stream out."""


@dataclass(frozen=True)
class Mixture:
    """The streams of all positions. It takes a few numbers per phase, and no others."""

    phases: tuple[Phase, ...]
    """At least one, with starts that ascend from 0, and of as many streams each."""
    _starts: Integers = field(init=False, repr=False, compare=False)
    """(phases,)."""
    _shares: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    """Of each phase, for all streams but the last; see `_shares_of`."""
    _before: Integers = field(init=False, repr=False, compare=False)
    """(phases, streams): samples of each stream before each phase."""

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        assert starts[0] == 0, "the first phase begins with the run"
        assert all(a < b for a, b in pairwise(starts)), "phases ascend"
        assert len({len(phase.weights) for phase in self.phases}) == 1
        shares = tuple(_shares_of(phase.weights) for phase in self.phases)
        before = [[0] * len(self.phases[0].weights)]
        for number, start in enumerate(starts[1:]):
            taken = _counts(start - starts[number], shares[number])
            before.append([sum(pair) for pair in zip(before[-1], taken, strict=True)])
        object.__setattr__(self, "_starts", np.array(starts, np.int64))
        object.__setattr__(self, "_shares", shares)
        object.__setattr__(self, "_before", np.array(before, np.int64))

    @classmethod
    def constant(cls, weights: Sequence[float]) -> Mixture:
        """Return the mixture that never changes."""
        return cls((Phase(0, tuple(weights)),))

    @property
    def n_streams(self) -> int:
        return len(self.phases[0].weights)

    def choose(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the stream of each position (n,), and how many of that stream came before it."""
        stream, index = np.empty_like(positions), np.empty_like(positions)
        phase = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(phase).tolist():
            mine = np.flatnonzero(phase == number)
            chosen, taken = _choose(positions[mine] - self._starts[number], self._shares[number])
            stream[mine] = chosen
            index[mine] = taken + self._before[number][chosen]
        return stream, index

    def counts(self, position: int) -> list[int]:
        """Return how many samples of each stream come before a position."""
        number = self._phase_at(position)
        taken = _counts(position - int(self._starts[number]), self._shares[number])
        return [int(sum(pair)) for pair in zip(self._before[number], taken, strict=True)]

    def in_use(self, position: int) -> list[int]:
        """Return the streams that have a share of the samples at a position."""
        weights = self.phases[self._phase_at(position)].weights
        return [number for number, weight in enumerate(weights) if weight > 0]

    def _phase_at(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, side="right")) - 1


def _choose(positions: Integers, shares: Sequence[int]) -> tuple[Integers, Integers]:
    """Return stream and number within the stream of positions that count from a phase's start.

    Streams are split off one after the other, each evenly spread (Bresenham's line) over the
    positions that those before it left. So at any position of a phase each stream has had its
    share to within one sample per stream, however long the phase.
    """
    stream = np.full(positions.shape, len(shares), np.int64)
    index = np.empty_like(stream)
    undecided = np.arange(len(positions))
    left = positions.astype(np.uint64)
    for number, share in enumerate(shares):
        before = _scale(left, share)
        taken = _scale(left + np.uint64(1), share) > before
        stream[undecided[taken]] = number
        index[undecided[taken]] = before[taken]
        left = left[~taken] - before[~taken]
        undecided = undecided[~taken]
    index[undecided] = left
    return stream, index


def _counts(length: int, shares: Sequence[int]) -> list[int]:
    """Return how many of the first `length` positions of a phase each stream takes."""
    counts, left = [], length
    for share in shares:
        counts.append(left * share >> SHARE_BITS)
        left -= counts[-1]
    return [*counts, left]


def _shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Return what each stream but the last takes of what is left, in units of 2**-SHARE_BITS."""
    assert any(weights), "a mixture of nothing"
    whole = 1 << SHARE_BITS
    shares = []
    for number, weight in enumerate(weights[:-1]):
        if weight == 0:
            shares.append(0)
        elif not any(weights[number + 1 :]):
            shares.append(whole)
        else:
            share = _part(weights[number:])
            shares.append(min(max(round(share * whole), 1), whole - 1))
    return tuple(shares)


def _part(weights: Sequence[float]) -> float:
    """Return the first weight by the sum of all, also where that sum is beyond what floats hold."""
    _, exponent = math.frexp(max(weights))
    scaled = [math.ldexp(weight, -exponent) for weight in weights]  # which rounds nothing
    # fsum is exact; sum() rounds differently from Python 3.12 on.
    return scaled[0] / math.fsum(scaled)


def _scale(counts: NDArray[np.uint64], share: int) -> NDArray[np.uint64]:
    """Return floor(counts * share / 2**SHARE_BITS), exactly, also where that product overflows."""
    high, low = np.divmod(counts, np.uint64(1 << SHARE_BITS))
    return high * np.uint64(share) + ((low * np.uint64(share)) >> np.uint64(SHARE_BITS))
