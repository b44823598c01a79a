"""Which sizes of microbatch are worth timing, and when it is worth timing any. Pure arithmetic.

A search from the size that the estimate gives: half as many microbatches a step while that is
faster and surely fits, then twice as many while that is. What is timed is told from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpt.recipe.budget import flops_per_token
from mpt.recipe.fit import Fit
from mpt.recipe.machine import Machine
from mpt.recipe.recipe import Recipe
from mpt.recipe.room import share_of

PROBE_SHARE = 0.01
"""Of what a run computes that a probe may cost."""
ROUNDS = 3
"""Times that each size is timed, after one that is not."""
MOST_TRIED = 5
"""Sizes."""
MEMORY_LIMIT = 0.85
"""Of a GPU's memory that tensors may take when it is measured: the rest is for what the allocator
cannot use, and for the buffers of communication."""

_COMPILE_FLOPS = {"cpu": 1.2e13, "cuda": 1e16}
"""What a device computes in the time that compiling for one more size takes: 35 s on two cores, by
measurement; half a minute on a GPU, by assumption."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What was seen of one size, on the rank where it was worst."""

    microbatch_size: int
    step_s: float
    """Of the passes of a whole step."""
    resident_bytes: int | None = None
    """What tensors take of a GPU's memory between steps; None on a CPU."""
    peak_bytes: int | None = None
    """What they take at most."""

    def fits(self, limit_bytes: float) -> bool:
        """Whether it is known to fit, or the estimate is all there is."""
        return self.peak_bytes is None or self.peak_bytes <= limit_bytes

    def may_grow_to(self, size: int, limit_bytes: float) -> bool:
        """Whether a larger size surely fits, by what this one has taken."""
        if self.peak_bytes is None or self.resident_bytes is None:
            return False
        # The head's chunk of logits does not grow with it, so this is rather too much.
        more = (self.peak_bytes - self.resident_bytes) * size / self.microbatch_size
        return self.resident_bytes + more <= limit_bytes


def probe_pays(recipe: Recipe, machine: Machine, chosen: Fit, world_size: int) -> bool:
    """Return whether timing sizes costs at most `PROBE_SHARE` of the run, at the very worst."""
    share, size = share_of(recipe, world_size), chosen.microbatch_size
    if recipe.train.microbatch_size != "auto" or share == 1:
        return False
    largest = min(share, size * 2 ** (MOST_TRIED - 1)) if machine.device == "cuda" else size
    # Sizes are each half of the one before; of each, passes with and without reduction.
    samples = 2 * largest * 2 * (1 + ROUNDS)
    of_a_sample = recipe.model.max_seq_len * flops_per_token(recipe.model)
    cost = samples * of_a_sample
    if chosen.compile:
        cost += (MOST_TRIED - 1) * _COMPILE_FLOPS[machine.device]
    return cost <= PROBE_SHARE * recipe.train.steps * share * of_a_sample


def next_size(tried: Sequence[Tried], first: int, share: int, memory_bytes: int) -> int | None:
    """Return the size to try next, or None if there is nothing more to gain.

    Args:
        first: the size to begin with.
        share: this rank's samples of a step. Each size cuts it into parts as equal as can be.
        memory_bytes: of the device.
    """
    limit = MEMORY_LIMIT * memory_bytes
    if not tried:
        return first
    if len(tried) >= MOST_TRIED:
        return None
    sizes = [each.microbatch_size for each in tried]
    largest = max(tried, key=lambda each: each.microbatch_size)
    best = fastest(tried, memory_bytes)
    larger = _parts(share, max(1, -(-share // max(sizes)) // 2))
    if best is largest and larger > max(sizes) and largest.may_grow_to(larger, limit):
        return larger
    smaller = _parts(share, 2 * -(-share // min(sizes)))
    if best.microbatch_size == min(sizes) and smaller < min(sizes):
        return smaller
    return None


def fastest(tried: Sequence[Tried], memory_bytes: int) -> Tried:
    """Return the one to take: the fastest that fits, or the smallest if none does."""
    fitting = [each for each in tried if each.fits(MEMORY_LIMIT * memory_bytes)]
    if not fitting:
        return min(tried, key=lambda each: each.microbatch_size)
    return min(fitting, key=lambda each: each.step_s)


def _parts(share: int, n: int) -> int:
    return -(-share // n)
