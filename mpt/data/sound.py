"""Samples that can be trained on: others are found, and named, before they reach a device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpt.data.dataset import Dataset
from mpt.errors import BadRowError, DataError
from mpt.recipe.model import Model
from mpt.state import BadSample

Integers = NDArray[np.int64]

Bad = dict[int, BadSample]
"""Those of some samples that cannot be trained on, by their number among them."""


def read_sound(
    dataset: Dataset, name: str, shard: Integers, row: Integers, model: Model, *, skip: bool | None
) -> tuple[Integers, Bad]:
    """Return samples (n, S) in the order asked for, and which of them are bad: those are zeros.

    On a GPU a token id outside the vocabulary would end in a bare fault.

    Args:
        name: of the stream, for messages.
        shard, row: (n,).
        skip: return bad ones instead of raising; null where that is not to be had.

    Raises:
        DataError: a shard that cannot be read, or a bad sample; names stream, shard and row.
    """
    samples, bad = _read(dataset, name, shard, row, skip=bool(skip))
    if not len(samples) or (samples.min() >= 0 and samples.max() < model.vocab_size):
        return samples, bad
    outside = (samples < 0) | (samples >= model.vocab_size)
    for number in np.flatnonzero(outside.any(axis=1)).tolist():
        token = samples[number][outside[number]][0]
        why = f"token id {token} is outside the vocabulary; model.vocab_size is {model.vocab_size}"
        where = dataset.name_of(int(shard[number]))
        bad[number] = BadSample(name, where, int(row[number]), why)
        if not skip:
            way_out = ", or leave out such samples with data.on_bad_sample=skip"
            raise DataError(f"{bad[number]}. Mend the data{'' if skip is None else way_out}.")
        samples[number] = 0
    return samples, bad


def _read(
    dataset: Dataset, name: str, shard: Integers, row: Integers, *, skip: bool
) -> tuple[Integers, Bad]:
    """Return samples with any token ids; the bad ones are those of another length."""
    try:
        return dataset.rows(shard, row), {}
    except BadRowError as error:
        if not skip:
            raise DataError(f"{name}: {error}") from error
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    samples, bad = np.zeros((len(row), dataset.sample_length), np.int64), {}
    for number in range(len(row)):  # one by one, since one of them is bad
        only = slice(number, number + 1)
        try:
            samples[only] = dataset.rows(shard[only], row[only])
        except BadRowError as error:
            where = dataset.name_of(int(shard[number]))
            bad[number] = BadSample(name, where, int(row[number]), error.why)
    return samples, bad
