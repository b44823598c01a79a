"""Shards fetched before they are read, by threads that follow the order of samples."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from mpt.data.cache import BusyError
from mpt.data.dataset import Dataset
from mpt.data.order import WINDOW_SHARDS, Order
from mpt.errors import DataError

N_DOWNLOADS = 4
"""At once, per rank. The ranks of a node share the work: none waits for what another fetches."""


class Ahead:
    """Has the shards of this window of the order, and of the next, copied into the cache.

    Whoever reads a shard does not depend on this: it fetches what is not there, and reports
    what cannot be fetched.
    """

    def __init__(self, datasets: Sequence[Dataset], order: Order) -> None:
        """Start no thread before the first shard to fetch.

        Raises:
            DataError: the cache's limit is below what one window and the next one take.
        """
        self._datasets, self._order = datasets, order
        self._threads = ThreadPoolExecutor(N_DOWNLOADS, thread_name_prefix="mpt-ahead")
        self._asked: dict[tuple[int, int], Future[None]] = {}
        self._check_limit()

    def look(self, start: int) -> None:
        """See to the shards that the batch at a position needs, and those that come after it."""
        wanted = [
            (stream, shard)
            for stream, shard in self._order.shards_ahead(start)
            if self._datasets[stream].needs_copy(shard)
        ]
        for old in self._asked.keys() - set(wanted):
            self._asked.pop(old).cancel()
        for key in wanted:
            if key not in self._asked:
                self._asked[key] = self._threads.submit(self._fetch, *key)

    def close(self) -> None:
        """End the threads, and all downloads of these datasets."""
        for dataset in self._datasets:
            dataset.store.stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, stream: int, shard: int) -> None:
        with suppress(BusyError, DataError):  # whoever needs the shard tries again, and says why
            self._datasets[stream].fetch(shard)

    def _check_limit(self) -> None:
        copied = [dataset for dataset in self._datasets if dataset.needs_copies]
        if not copied or (limit := copied[0].store.settings.limit_bytes) is None:
            return
        needed = 0
        for dataset in copied:
            sizes = sorted(shard.copy_bytes for shard in dataset.shards)
            needed += sum(sizes[-2 * WINDOW_SHARDS :])
        if limit < needed:
            raise DataError(
                f"data.cache.limit_bytes: {limit} is too little: two windows of {WINDOW_SHARDS} "
                f"shards of each stream take {needed}; use that or more."
            )
