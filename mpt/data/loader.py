"""Microbatches for one rank: the samples of a global batch, read ahead on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpt.data.ahead import Ahead, NodePart, check_limit
from mpt.data.dataset import Dataset, open_dataset
from mpt.data.mixture import Mixture
from mpt.data.order import Located, Order, rank_slice, share
from mpt.data.shard import common_dtype
from mpt.data.sound import Bad, read_sound
from mpt.data.streams import mixture_of, names_of
from mpt.data.targets import Prepared, documents_of, token_ids
from mpt.errors import DataError
from mpt.recipe.data import Data
from mpt.recipe.model import Model
from mpt.state import BadSample, Microbatch

Integers = NDArray[np.int64]

BATCHES_AHEAD = 2
"""Batches that are read before they are asked for."""
BATCHES_FETCHED_AHEAD = 8
"""Batches whose shards are fetched first of all, where shards are fetched."""


class Loader:
    """This rank's microbatches of the global batch at any position: there is no state to save.

    Every rank gets the same number of microbatches of the same shape, whatever the world size:
    what its share of the batch does not fill has all targets ignored. Which samples of the batch
    a rank gets follows their shards, so that each node reads a part of the shards (mpt.data.order).
    """

    def __init__(
        self,
        data: Data,
        model: Model,
        *,
        seed: int,
        global_batch_size: int,
        microbatch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        node_ranks: range | None = None,
        eod_id: int | None = None,
        following: Callable[[int], int] | None = None,
    ) -> None:
        """Open the streams; no sample is read before the first `next`.

        Args:
            node_ranks: of this node, which share a cache; null if each rank is its own node.
            eod_id: the token that ends a document, if documents are to be told apart.
            following: position of a global batch -> position of the one that will come after
                it, where that is not the next in the order.

        Raises:
            DataError: a stream is missing, corrupt, or of another sample length.
        """
        self._names = names_of(data)
        paths = (data.streams[name].path for name in self._names)
        self._datasets = [open_dataset(path, data.cache) for path in paths]
        for dataset in self._datasets:
            _check_length(dataset, model)
        self._dtype = common_dtype(dataset.dtype for dataset in self._datasets)
        self._order = Order(
            [dataset.shard_sizes for dataset in self._datasets],
            mixture_of(data, [len(dataset) for dataset in self._datasets], global_batch_size),
            seed,
            data.shuffle,
        )
        node = NodePart(node_ranks or range(rank, rank + 1), world_size)
        check_limit(self._datasets, node, global_batch_size, shuffle=data.shuffle)
        copied = any(dataset.needs_copies for dataset in self._datasets)
        self._copies = Ahead(self._datasets, self._order, node) if copied else None
        self._located = lru_cache(BATCHES_FETCHED_AHEAD + 1)(self._locate)
        self._model, self._skip = model, data.on_bad_sample == "skip"
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._microbatch_size = microbatch_size
        self._device, self._eod_id = device, eod_id
        self._following = following or (lambda position: position + global_batch_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mpt-loader")
        self._ahead: dict[int, Future[Prepared]] = {}

    def next(self, position: int) -> list[Microbatch]:
        """Return the microbatches of the batch at `position`, and begin to read those after it.

        Positions may come in any order; those that follow each other are read ahead.

        Raises:
            DataError: a sample that cannot be read, or a token id outside the vocabulary;
                names stream, shard and row.
        """
        wanted = [position]
        for _ in range(BATCHES_AHEAD):
            wanted.append(self._following(wanted[-1]))
        for old in [start for start in self._ahead if start not in wanted]:
            self._ahead.pop(old).cancel()
        for start in wanted:
            if start not in self._ahead:
                self._ahead[start] = self._thread.submit(self._read, start)
        return self._ahead.pop(position).result().on(self._device)

    def close(self) -> None:
        """End the threads; the loader is of no use afterwards."""
        if self._copies is not None:
            self._copies.close()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, start: int) -> Prepared:
        if self._copies is not None:
            starts = [start]
            for _ in range(BATCHES_FETCHED_AHEAD):
                starts.append(self._following(starts[-1]))
            self._copies.look(start, [self._located(each) for each in starts])
        at = self._located(start)
        mine = share(at, range(self._rank, self._rank + 1), self._world_size)
        samples, bad = self._samples(at, mine)
        n_microbatches = _microbatches_per_rank(
            self._global_batch_size, self._world_size, self._microbatch_size
        )
        pin = self._device.type == "cuda"
        return _cut(samples, bad, n_microbatches, self._microbatch_size, pin, self._eod_id)

    def _locate(self, start: int) -> Located:
        """Return where the samples of the global batch at a position are."""
        stop = start + self._global_batch_size
        return self._order.locate(np.arange(start, stop, dtype=np.int64))

    def _samples(self, at: Located, mine: Integers) -> tuple[NDArray[Any], Bad]:
        """Return some samples of a batch, (n, S), and which of them are bad."""
        samples = np.empty((len(mine), self._model.max_seq_len), self._dtype)
        bad: Bad = {}
        for number, (name, dataset) in enumerate(zip(self._names, self._datasets, strict=True)):
            places = np.flatnonzero(at.stream[mine] == number)
            if places.size:
                shard, row = at.shard[mine[places]], at.row[mine[places]]
                found = read_sound(dataset, name, shard, row, self._model, skip=self._skip)
                if places.size == len(samples):  # one stream alone: not copied again
                    samples = found[0]
                else:
                    samples[places] = found[0]
                bad |= {int(places[i]): sample for i, sample in found[1].items()}
        return samples, bad


def eval_batches(
    dataset: Dataset,
    model: Model,
    *,
    samples: int | None,
    microbatch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    eod_id: int | None = None,
) -> Iterator[Microbatch]:
    """Yield this rank's share of the first `samples` held-out samples, in file order.

    Every rank gets the same number of microbatches of the same shape, padded with ignored
    targets as in training.

    Args:
        samples: how many over all ranks; null, or more than there are, means all.
        eod_id: as Loader's.

    Raises:
        DataError: as Loader's.
    """
    _check_length(dataset, model)
    n_samples = min(samples or len(dataset), len(dataset))
    part = rank_slice(n_samples, rank, world_size)
    order = Order([dataset.shard_sizes], Mixture.constant([1.0]), seed=0, shuffle=False)
    pin = device.type == "cuda"
    for number in range(_microbatches_per_rank(n_samples, world_size, microbatch_size)):
        start = part.start + number * microbatch_size
        stop = min(start + microbatch_size, part.stop)
        at = order.locate(np.arange(start, max(start, stop), dtype=np.int64))
        rows, bad = read_sound(dataset, "eval", at.shard, at.row, model, skip=None)
        yield from _cut(rows, bad, 1, microbatch_size, pin, eod_id).on(device)


def _check_length(dataset: Dataset, model: Model) -> None:
    if dataset.sample_length != model.max_seq_len:
        raise DataError(
            f"{dataset.location}: samples of {dataset.sample_length} tokens, but "
            f"model.max_seq_len is {model.max_seq_len}."
        )


def _microbatches_per_rank(n_samples: int, world_size: int, microbatch_size: int) -> int:
    """Return the same number for every rank: enough for the rank with the largest share."""
    largest_share = -(-n_samples // world_size)
    return -(-largest_share // microbatch_size)


def _cut(
    samples: NDArray[Any],
    bad: Bad,
    n_microbatches: int,
    microbatch_size: int,
    pin: bool,
    eod_id: int | None,
) -> Prepared:
    """Pad samples (n, S) with ignored rows, and cut them into microbatches of one shape."""
    n_rows, length = n_microbatches * microbatch_size, samples.shape[1]
    ids = token_ids(samples, n_rows).reshape(n_microbatches, microbatch_size, length + 1)
    skipped: dict[int, tuple[BadSample, ...]] = {}
    for row, sample in bad.items():
        number = row // microbatch_size
        skipped[number] = (*skipped.get(number, ()), sample)
    return Prepared(
        ids=_tensor(ids, pin),
        ignored=sorted({*bad, *range(len(samples), n_rows)}),
        documents=None if eod_id is None else _tensor(documents_of(ids[..., :-1], eod_id), pin),
        skipped=skipped,
    )


def _tensor(rows: Integers, pin: bool) -> torch.Tensor:
    tensor = torch.from_numpy(rows)
    return tensor.pin_memory() if pin else tensor
