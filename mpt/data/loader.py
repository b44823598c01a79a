"""Microbatches for one rank: the samples of a global batch, read ahead on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from mpt.data.ahead import Ahead
from mpt.data.dataset import Dataset, open_dataset
from mpt.data.order import Order, rank_slice
from mpt.errors import DataError
from mpt.recipe.data import Data
from mpt.recipe.model import Model
from mpt.state import IGNORE, Microbatch

Integers = NDArray[np.int64]

BATCHES_AHEAD = 2


class Loader:
    """This rank's microbatches of the global batch at any position: there is no state to save.

    Every rank gets the same number of microbatches of the same shape, whatever the world size:
    what its share of the batch does not fill has all targets ignored.
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
        eod_id: int | None = None,
        following: Callable[[int], int] | None = None,
    ) -> None:
        """Open the streams; no sample is read before the first `next`.

        Args:
            eod_id: the token that ends a document, if documents are to be told apart.
            following: position of a global batch -> position of the one that will come after
                it, where that is not the next in the order.

        Raises:
            DataError: a stream is missing, corrupt, or of another sample length.
        """
        # By name, so that the order of lines in the recipe has no part in the order of samples.
        streams = sorted(data.streams.items())
        self._names = [name for name, _ in streams]
        self._datasets = [open_dataset(stream.path, data.cache) for _, stream in streams]
        for dataset in self._datasets:
            _check_length(dataset, model)
        self._order = Order(
            [dataset.shard_sizes for dataset in self._datasets],
            [stream.weight for _, stream in streams],
            global_batch_size=global_batch_size,
            seed=seed,
            shuffle=data.shuffle,
        )
        copied = any(dataset.needs_copies for dataset in self._datasets)
        self._copies = Ahead(self._datasets, self._order) if copied else None
        self._model = model
        self._rank, self._world_size = rank, world_size
        self._microbatch_size = microbatch_size
        self._device, self._eod_id = device, eod_id
        self._following = following or (lambda position: position + global_batch_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mpt-loader")
        self._ahead: dict[int, Future[list[Microbatch]]] = {}

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
        return [_to(microbatch, self._device) for microbatch in self._ahead.pop(position).result()]

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

    def _read(self, start: int) -> list[Microbatch]:
        if self._copies is not None:
            self._copies.look(start)
        positions = self._order.rank_positions(start, self._rank, self._world_size)
        at = self._order.locate(positions)
        samples = np.empty((len(positions), self._model.max_seq_len), np.int64)
        for number, (name, dataset) in enumerate(zip(self._names, self._datasets, strict=True)):
            mine = np.flatnonzero(at.stream == number)
            if mine.size:
                found = _read_checked(dataset, at.shard[mine], at.row[mine], self._model, name)
                samples[mine] = found
        n_microbatches = _microbatches_per_rank(
            self._order.global_batch_size, self._world_size, self._microbatch_size
        )
        pin = self._device.type == "cuda"
        return _cut(samples, n_microbatches, self._microbatch_size, pin, self._eod_id)


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
    share = rank_slice(n_samples, rank, world_size)
    order = Order([dataset.shard_sizes], [1.0], n_samples, seed=0, shuffle=False)
    pin = device.type == "cuda"
    for number in range(_microbatches_per_rank(n_samples, world_size, microbatch_size)):
        start = share.start + number * microbatch_size
        stop = min(start + microbatch_size, share.stop)
        at = order.locate(np.arange(start, max(start, stop), dtype=np.int64))
        rows = _read_checked(dataset, at.shard, at.row, model, "eval")
        yield _to(_cut(rows, 1, microbatch_size, pin, eod_id)[0], device)


def _check_length(dataset: Dataset, model: Model) -> None:
    if dataset.sample_length != model.max_seq_len:
        raise DataError(
            f"{dataset.location}: samples of {dataset.sample_length} tokens, but "
            f"model.max_seq_len is {model.max_seq_len}."
        )


def _read_checked(
    dataset: Dataset, shard: Integers, row: Integers, model: Model, name: str
) -> Integers:
    """Return samples (n, S), all ids within the vocabulary: on a GPU others end in a bare fault."""
    try:
        samples = dataset.rows(shard, row)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    if not len(samples) or (samples.min() >= 0 and samples.max() < model.vocab_size):
        return samples
    bad = int(np.flatnonzero(((samples < 0) | (samples >= model.vocab_size)).any(axis=1))[0])
    token = next(token for token in samples[bad].tolist() if not 0 <= token < model.vocab_size)
    raise DataError(
        f"{name}: {dataset.name_of(int(shard[bad]))}: row {row[bad]}: token id {token} is "
        f"outside the vocabulary; model.vocab_size is {model.vocab_size}."
    )


def _microbatches_per_rank(n_samples: int, world_size: int, microbatch_size: int) -> int:
    """Return the same number for every rank: enough for the rank with the largest share."""
    largest_share = -(-n_samples // world_size)
    return -(-largest_share // microbatch_size)


def _cut(
    samples: Integers, n_microbatches: int, microbatch_size: int, pin: bool, eod_id: int | None
) -> list[Microbatch]:
    """Pad samples (n, S) with ignored rows, and cut them into microbatches of one shape."""
    # In numpy: torch would start threads of its own here, beside those that train.
    n, length = samples.shape
    tokens = np.zeros((n_microbatches, microbatch_size, length), np.int64)
    targets = np.full_like(tokens, IGNORE)
    tokens.reshape(-1, length)[:n] = samples
    targets.reshape(-1, length)[:n, :-1] = samples[:, 1:]  # the last token has no next one
    arrays = [tokens, targets] if eod_id is None else [tokens, targets, documents(tokens, eod_id)]
    tensors = (torch.from_numpy(array) for array in arrays)
    parts = zip(*(tensor.pin_memory() if pin else tensor for tensor in tensors), strict=True)
    return [Microbatch(*part) for part in parts]


def documents(tokens: Integers, eod_id: int) -> Integers:
    """Return which document of its sample each token is of, from 0: (..., S) -> (..., S).

    The token that ends a document belongs to it.
    """
    ends = tokens == eod_id
    found: Integers = np.cumsum(ends, axis=-1) - ends
    return found


def _to(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """Copy to the device without waiting for it, from pinned memory."""
    documents = microbatch.documents
    return Microbatch(
        microbatch.tokens.to(device, non_blocking=True),
        microbatch.targets.to(device, non_blocking=True),
        None if documents is None else documents.to(device, non_blocking=True),
    )
