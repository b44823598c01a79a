"""Which sample stands at which position: pure arithmetic on the seed, no files, no state.

A position picks its stream by the weights and becomes an index within that stream. Index j
of n samples is epoch j // n. An epoch takes the stream's shards in an order of its own,
WINDOW_SHARDS at a time, and shuffles the samples of those shards among each other. So a
reader needs a few shards at a time, and any position costs the same to find.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mpt.data.shuffle import mix, permute

Integers = NDArray[np.int64]

WINDOW_SHARDS = 16
"""Shards whose samples are shuffled together; part of the order, so never a setting."""
SHARE_BITS = 32
"""Weights are rounded to multiples of 2**-32."""


@dataclass(frozen=True)
class Located:
    """Where samples are, each int64 (n,)."""

    stream: Integers
    shard: Integers
    row: Integers


@dataclass(frozen=True)
class _Epoch:
    """One stream's shards in the order of one epoch."""

    shards: Integers
    """(k,): shard numbers."""
    starts: Integers
    """(k + 1,): samples of the epoch before each of them."""


@dataclass(frozen=True, eq=False)
class Order:
    """A fixed, endless order of samples, cut into global batches."""

    shard_sizes: Sequence[Integers]
    """Samples in each shard, int64 (shards,), per stream; no stream is empty."""
    weights: Sequence[float]
    """Share of the samples per stream, relative to the others, each positive."""
    global_batch_size: int
    """Samples per step."""
    seed: int
    shuffle: bool = True
    """False takes each stream in file order, epoch after epoch."""
    _epoch: Callable[[int, int], _Epoch] = field(init=False, repr=False)
    """(stream, epoch) -> _Epoch. Two per stream are kept: a step may reach over an end."""

    def __post_init__(self) -> None:
        assert len(self.shard_sizes) == len(self.weights) > 0
        assert all(sizes.sum() > 0 for sizes in self.shard_sizes), "a stream without samples"
        memo = lru_cache(maxsize=2 * len(self.weights))(self._order_shards)
        object.__setattr__(self, "_epoch", memo)

    def batch_positions(self, start: int) -> Integers:
        """Return the positions of the global batch at `start`, int64 (global_batch_size,)."""
        return np.arange(start, start + self.global_batch_size, dtype=np.int64)

    def rank_positions(self, start: int, rank: int, world_size: int) -> Integers:
        """Return this rank's contiguous share of the batch: sizes differ by one at most."""
        share = rank_slice(self.global_batch_size, rank, world_size)
        return self.batch_positions(start)[share]

    def locate(self, positions: Integers) -> Located:
        """Return stream, shard and row of each position (n,), in the order given."""
        stream, index = self._choose_streams(positions)
        shard, row = np.empty_like(index), np.empty_like(index)
        for number in range(len(self.weights)):
            mine = np.flatnonzero(stream == number)
            if mine.size:
                shard[mine], row[mine] = self._locate_within(number, index[mine])
        return Located(stream, shard, row)

    def shards_ahead(self, start: int) -> list[tuple[int, int]]:
        """Return (stream, shard) of the window that the batch at `start` is in, and of the next.

        Those of this window come first, then those of the window after it, of each stream that
        the batch has samples of.
        """
        stream, index = self._choose_streams(self.batch_positions(start))
        found: list[tuple[int, int, int]] = []  # which window from here, stream, shard
        for number in np.unique(stream).tolist():
            epoch, offset = divmod(int(index[stream == number][0]), self.shard_sizes[number].sum())
            table = self._epoch(number, int(epoch))
            slot = int(np.searchsorted(table.starts, offset, side="right")) - 1
            window = slot // WINDOW_SHARDS * WINDOW_SHARDS
            here = table.shards[window : window + WINDOW_SHARDS]
            following = table.shards[window + WINDOW_SHARDS : window + 2 * WINDOW_SHARDS]
            if not len(following):
                following = self._epoch(number, int(epoch) + 1).shards[:WINDOW_SHARDS]
            found += [(0, number, shard) for shard in here.tolist()]
            found += [(1, number, shard) for shard in following.tolist()]
        found.sort(key=lambda entry: entry[0])
        return list(dict.fromkeys((number, shard) for _, number, shard in found))

    def _choose_streams(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the stream of each position, and how many of that stream came before it.

        Streams are split off one after the other, each evenly spread (Bresenham's line)
        over the positions that those before it left. So at any position each stream has
        had its share to within one sample per stream, for ever.
        """
        stream = np.full(positions.shape, len(self.weights) - 1, np.int64)
        index = np.empty_like(stream)
        undecided = np.arange(len(positions))
        left = positions.astype(np.uint64)
        for number, share in enumerate(_shares(self.weights)):
            before = _scale(left, share)
            taken = _scale(left + np.uint64(1), share) > before
            stream[undecided[taken]] = number
            index[undecided[taken]] = before[taken]
            left = left[~taken] - before[~taken]
            undecided = undecided[~taken]
        index[undecided] = left
        return stream, index

    def _locate_within(self, stream: int, index: Integers) -> tuple[Integers, Integers]:
        """Return shard and row of the index-th samples of a stream."""
        epochs, offsets = np.divmod(index, self.shard_sizes[stream].sum())
        shard, row = np.empty_like(index), np.empty_like(index)
        for epoch in np.unique(epochs):
            mine = np.flatnonzero(epochs == epoch)
            table = self._epoch(stream, int(epoch))
            place = offsets[mine]
            if self.shuffle:
                place = self._shuffle_windows(table, place, stream, int(epoch))
            slot = np.searchsorted(table.starts, place, side="right") - 1
            shard[mine] = table.shards[slot]
            row[mine] = place - table.starts[slot]
        return shard, row

    def _shuffle_windows(self, table: _Epoch, place: Integers, stream: int, epoch: int) -> Integers:
        """Move each place of an epoch to another one in the same window of shards."""
        bounds = np.append(table.starts[:-1:WINDOW_SHARDS], table.starts[-1])
        window = np.searchsorted(bounds, place, side="right") - 1
        start, size = bounds[window], bounds[window + 1] - bounds[window]
        key = mix(self.seed, stream, epoch, window)
        moved = permute((place - start).astype(np.uint64), size.astype(np.uint64), key)
        return start + moved.astype(np.int64)

    def _order_shards(self, stream: int, epoch: int) -> _Epoch:
        sizes = self.shard_sizes[stream]
        shards = np.arange(len(sizes), dtype=np.int64)
        if self.shuffle:
            shards = np.argsort(mix(self.seed, stream, epoch, shards), kind="stable")
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[shards])])
        return _Epoch(shards, starts)


def rank_slice(n_samples: int, rank: int, world_size: int) -> slice:
    """Return one rank's part of n samples: contiguous, disjoint, together the whole."""
    return slice(n_samples * rank // world_size, n_samples * (rank + 1) // world_size)


def _shares(weights: Sequence[float]) -> list[int]:
    """Return what each stream but the last takes of what is left, in units of 2**-SHARE_BITS."""
    whole = 1 << SHARE_BITS
    # fsum is exact; sum() rounds differently from Python 3.12 on.
    shares = (weights[i] / math.fsum(weights[i:]) for i in range(len(weights) - 1))
    return [min(max(round(share * whole), 1), whole - 1) for share in shares]


def _scale(counts: NDArray[np.uint64], share: int) -> NDArray[np.uint64]:
    """Return floor(counts * share / 2**SHARE_BITS), exactly, also where that product overflows."""
    high, low = np.divmod(counts, np.uint64(1 << SHARE_BITS))
    return high * np.uint64(share) + ((low * np.uint64(share)) >> np.uint64(SHARE_BITS))
