"""Which sample stands at which position: pure arithmetic on the seed, no files, no state.

A position picks its stream by the mixture and becomes an index within that stream. Index j
of n samples is epoch j // n. An epoch takes the stream's shards in an order of its own,
WINDOW_SHARDS at a time, and shuffles the samples of those shards among each other. So a
reader needs a few shards at a time, and any position costs the same to find.

Which samples are in a step hangs on nothing but this. Who computes them does not matter to the
step, so it follows the shards: see `share`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mpt.data.mixture import Mixture
from mpt.data.shuffle import mix, permute

Integers = NDArray[np.int64]

WINDOW_SHARDS = 16
"""Shards whose samples are shuffled together; part of the order, so never a setting. With shards
of 64 MiB it is a gigabyte that one node alone must fetch before its first step, and neighbours in
a shard are some 75 steps of 1,024 samples apart. Windows of 64 would make that 300, ask for four
times the bytes and the disk, and save 64 nodes only a quarter of what they fetch
(tests/bench/locality.md)."""


@dataclass(frozen=True)
class Located:
    """Where samples are, each (n,)."""

    stream: Integers
    shard: Integers
    row: Integers
    place: NDArray[np.float64]
    """How far into the window of shards that the sample was shuffled in it lies, in [0, 1):
    samples of one shard have places next to each other."""


@dataclass(frozen=True)
class Window:
    """Shards of a stream whose samples are shuffled together."""

    stream: int
    shards: Integers
    """(k,)."""
    bounds: NDArray[np.float64]
    """(k + 1,): the place where each shard begins, and 1."""

    def between(self, low: float, high: float) -> list[int]:
        """Return the shards that have samples with places in [low, high)."""
        touched = (self.bounds[:-1] < high) & (self.bounds[1:] > low)
        shards: list[int] = self.shards[touched].tolist()
        return shards


@dataclass(frozen=True)
class _Epoch:
    """One stream's shards in the order of one epoch."""

    shards: Integers
    """(k,): shard numbers."""
    starts: Integers
    """(k + 1,): samples of the epoch before each of them."""
    window_starts: Integers
    """(windows + 1,): samples of the epoch before each window."""

    def window(self, stream: int, number: int) -> Window:
        """Return the number-th window."""
        first = number * WINDOW_SHARDS
        shards = self.shards[first : first + WINDOW_SHARDS]
        starts = self.starts[first : first + len(shards) + 1]
        return Window(stream, shards, (starts - starts[0]) / max(starts[-1] - starts[0], 1))


@dataclass(frozen=True, eq=False)
class Order:
    """A fixed, endless sequence of samples; what cuts it into batches is not its business."""

    shard_sizes: Sequence[Integers]
    """Samples in each shard, int64 (shards,), per stream; no stream is empty."""
    mixture: Mixture
    """Of these streams."""
    seed: int
    shuffle: bool = True
    """False takes each stream in file order, epoch after epoch."""
    _totals: tuple[int, ...] = field(init=False, repr=False)
    """Samples of each stream."""
    _epoch: Callable[[int, int], _Epoch] = field(init=False, repr=False)
    """(stream, epoch) -> _Epoch. Two per stream are kept: a step may reach over an end."""

    def __post_init__(self) -> None:
        assert len(self.shard_sizes) == self.mixture.n_streams > 0
        object.__setattr__(self, "_totals", tuple(int(s.sum()) for s in self.shard_sizes))
        assert all(self._totals), "a stream without samples"
        memo = lru_cache(maxsize=2 * len(self.shard_sizes))(self._order_shards)
        object.__setattr__(self, "_epoch", memo)

    def locate(self, positions: Integers) -> Located:
        """Return where the samples at positions (n,) are, in the order given."""
        stream, index = self.mixture.choose(positions)
        shard, row = np.empty_like(index), np.empty_like(index)
        place = np.empty(index.shape, np.float64)
        for number in range(len(self.shard_sizes)):
            mine = np.flatnonzero(stream == number)
            if mine.size:
                shard[mine], row[mine], place[mine] = self._locate_within(number, index[mine])
        return Located(stream, shard, row, place)

    def windows_ahead(self, position: int) -> list[tuple[Window, Window]]:
        """Return the window that each stream in use at a position is in, and its next one."""
        found, counts = [], self.mixture.counts(position)
        for stream in self.mixture.in_use(position):
            epoch, offset = divmod(counts[stream], self._totals[stream])
            table = self._epoch(stream, epoch)
            slot = int(np.searchsorted(table.starts, offset, side="right")) - 1
            number = slot // WINDOW_SHARDS
            following = (table, number + 1)
            if (number + 1) * WINDOW_SHARDS >= len(table.shards):
                following = (self._epoch(stream, epoch + 1), 0)
            here = table.window(stream, number)
            found.append((here, following[0].window(stream, following[1])))
        return found

    def _locate_within(
        self, stream: int, index: Integers
    ) -> tuple[Integers, Integers, NDArray[np.float64]]:
        """Return shard, row and place of the index-th samples of a stream."""
        epochs, offsets = np.divmod(index, self._totals[stream])
        shard, row = np.empty_like(index), np.empty_like(index)
        place = np.empty(index.shape, np.float64)
        for epoch in np.unique(epochs):
            mine = np.flatnonzero(epochs == epoch)
            table = self._epoch(stream, int(epoch))
            moved, place[mine] = self._shuffle_windows(table, offsets[mine], stream, int(epoch))
            slot = np.searchsorted(table.starts, moved, side="right") - 1
            shard[mine] = table.shards[slot]
            row[mine] = moved - table.starts[slot]
        return shard, row, place

    def _shuffle_windows(
        self, table: _Epoch, offset: Integers, stream: int, epoch: int
    ) -> tuple[Integers, NDArray[np.float64]]:
        """Move each offset in an epoch to another one in the same window of shards.

        Returns:
            The new offsets, and how far each is into its window, in [0, 1).
        """
        bounds = table.window_starts
        window = np.searchsorted(bounds, offset, side="right") - 1
        start, size = bounds[window], bounds[window + 1] - bounds[window]
        within = offset - start
        if self.shuffle:
            key = mix(self.seed, stream, epoch, window)
            within = permute(within.astype(np.uint64), size.astype(np.uint64), key).astype(np.int64)
        return start + within, within / size

    def _order_shards(self, stream: int, epoch: int) -> _Epoch:
        sizes = self.shard_sizes[stream]
        shards = np.arange(len(sizes), dtype=np.int64)
        if self.shuffle:
            # No two are equal, since mix is a bijection of its last word: any sort does.
            shards = np.argsort(mix(self.seed, stream, epoch, shards))
        starts = np.zeros(len(shards) + 1, np.int64)
        np.cumsum(sizes[shards], out=starts[1:])
        return _Epoch(shards, starts, np.append(starts[:-1:WINDOW_SHARDS], starts[-1]))


def share(batch: Located, ranks: range, world_size: int) -> Integers:
    """Return which samples of a batch some consecutive ranks compute, int64 (m,), ascending.

    Samples are ranked by their place in their window of shards and cut evenly among all ranks:
    shares differ by one at most, are disjoint, and together are the batch. So the ranks of a node
    need about their part of the shards of each window, and no more; alone, they have all samples.
    """
    by_place = np.argsort(batch.place, kind="stable")
    n = len(by_place)
    part = by_place[n * ranks.start // world_size : n * ranks.stop // world_size]
    return np.sort(part)


def rank_slice(n_samples: int, rank: int, world_size: int) -> slice:
    """Return one rank's part of n samples: contiguous, disjoint, together the whole."""
    return slice(n_samples * rank // world_size, n_samples * (rank + 1) // world_size)
