"""Shards fetched before they are read, by threads that follow the order of samples."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from mpt.data.cache import BusyError
from mpt.data.dataset import Dataset
from mpt.data.order import WINDOW_SHARDS, Located, Order, share
from mpt.errors import DataError

N_DOWNLOADS = 4
"""At once, per rank. The ranks of a node share the work: none waits for what another fetches."""
MARGIN_SIGMAS = 4.0
"""Where a batch is cut between two nodes wobbles with its samples. A shard that a node needs only
by a rarer chance than this is fetched when a batch that needs it is near."""

Key = tuple[int, int]
"""Stream and shard."""


@dataclass(frozen=True)
class NodePart:
    """The ranks of one node: who shares a cache."""

    ranks: range
    world_size: int

    def interval(self, n_samples: int) -> tuple[float, float]:
        """Return the places in a window, from and to, that this node's part of batches is from.

        A cut at a share q of n samples, drawn from a window, has a standard deviation of
        sqrt(q (1 - q) / n).
        """
        low, high = self.ranks.start / self.world_size, self.ranks.stop / self.world_size
        low -= MARGIN_SIGMAS * math.sqrt(low * (1 - low) / n_samples)
        high += MARGIN_SIGMAS * math.sqrt(high * (1 - high) / n_samples)
        return max(low, 0.0), min(high, 1.0)


class Ahead:
    """Has the shards that this node needs, in this window of the order and the next, copied.

    Whoever reads a shard does not depend on this: it fetches what is not there, and reports
    what cannot be fetched.
    """

    def __init__(self, datasets: Sequence[Dataset], order: Order, node: NodePart) -> None:
        """Start no thread before the first shard to fetch."""
        self._datasets, self._order, self._node = datasets, order, node
        self._threads = ThreadPoolExecutor(N_DOWNLOADS, thread_name_prefix="mpt-ahead")
        self._lock = threading.Lock()
        self._queue: list[Key] = []
        self._taken: set[Key] = set()

    def look(self, position: int, batches: Sequence[Located]) -> None:
        """See to the shards that the batch at a position needs, and those that come after it.

        Args:
            batches: that batch and those known to follow it: their shards come first, all of them.
        """
        wanted = [key for key in self._wanted(position, batches) if self._copied(key)]
        with self._lock:
            self._taken &= set(wanted)
            before = len(self._queue)
            self._queue = [key for key in dict.fromkeys(wanted) if key not in self._taken]
            more = len(self._queue) - before
        for _ in range(more):
            self._threads.submit(self._fetch_next)

    def close(self) -> None:
        """End the threads, and all downloads of these datasets."""
        for dataset in self._datasets:
            dataset.store.stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _wanted(self, position: int, batches: Sequence[Located]) -> Iterable[Key]:
        for batch in batches:
            yield from shards_of(batch, self._node)
        low, high = 0.0, 1.0
        if self._order.shuffle:  # else a batch is one place, and every node reads there
            low, high = self._node.interval(len(batches[0].place))
        ahead = self._order.windows_ahead(position)
        for window in [here for here, _ in ahead] + [following for _, following in ahead]:
            for shard in window.between(low, high):
                yield window.stream, shard

    def _copied(self, key: Key) -> bool:
        stream, shard = key
        return self._datasets[stream].needs_copy(shard)

    def _fetch_next(self) -> None:
        with self._lock:
            if not self._queue:  # what was wanted when this was submitted no longer is
                return
            stream, shard = self._queue.pop(0)
            self._taken.add((stream, shard))
        with suppress(BusyError, DataError):  # whoever needs the shard tries again, and says why
            self._datasets[stream].fetch(shard)


def shards_of(batch: Located, node: NodePart) -> list[Key]:
    """Return the shards that a node's part of a batch is in."""
    mine = share(batch, node.ranks, node.world_size)
    pairs = np.stack([batch.stream[mine], batch.shard[mine]], axis=1)
    return [(stream, shard) for stream, shard in np.unique(pairs, axis=0).tolist()]


def check_limit(
    datasets: Sequence[Dataset], node: NodePart, n_samples: int, *, shuffle: bool
) -> None:
    """Refuse a limit of the cache below what this node may need at a time.

    Args:
        n_samples: of the global batch.
        shuffle: else every node reads everywhere.

    Raises:
        DataError: with the limit to set.
    """
    copied = [dataset for dataset in datasets if dataset.needs_copies]
    if not copied or (limit := copied[0].store.settings.limit_bytes) is None:
        return
    low, high = node.interval(n_samples) if shuffle else (0.0, 1.0)
    needed = 0
    for dataset in copied:
        sizes = sorted(shard.copy_bytes for shard in dataset.shards)
        two_windows = sum(sizes[-2 * WINDOW_SHARDS :])
        # At each end of its part of a window, a node needs a whole shard for a piece of one.
        needed += min(two_windows, math.ceil((high - low) * two_windows) + 4 * sizes[-1])
    if limit < needed:
        raise DataError(
            f"data.cache.limit_bytes: {limit} is too little: this node's part of two windows of "
            f"{WINDOW_SHARDS} shards of each stream takes {needed}; use that or more."
        )
