"""What a model reads, and what it is to say: samples, and the same ones one token on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpt.state import IGNORE, BadSample, Microbatch

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """Microbatches in host memory. Tokens and targets are two views of the same numbers, so those
    are written, and copied to a device, once."""

    ids: Tensor
    """(n, B, S + 1) int64: tokens, and what comes after the last of them, which is IGNORE."""
    ignored: Collection[int]
    """Of the n B rows, those without targets."""
    documents: Tensor | None
    """(n, B, S), as Microbatch's."""
    skipped: Mapping[int, tuple[BadSample, ...]]
    """As Microbatch's, by the microbatch that has any."""

    def on(self, device: torch.device) -> list[Microbatch]:
        """Copy to a device, without waiting for it where the memory is pinned."""
        ids = self.ids.to(device, non_blocking=True)
        targets = ids[..., 1:]
        if self.ignored:
            targets = targets.clone()
            for row in self.ignored:  # one by one: a list of rows would be waited for
                targets[divmod(row, ids.shape[1])].fill_(IGNORE)
        documents: Sequence[Tensor | None] = [None] * len(ids)
        if self.documents is not None:
            documents = self.documents.to(device, non_blocking=True).unbind()
        parts = zip(ids[..., :-1].unbind(), targets.unbind(), documents, strict=True)
        return [
            Microbatch(*part, self.skipped.get(number, ())) for number, part in enumerate(parts)
        ]


def token_ids(samples: NDArray[Any], n_rows: int) -> Integers:
    """Return samples (n, S) of any integer type as (n_rows, S + 1), S of them tokens.

    Rows beyond the samples are zeros; the last column is what no token is asked for.
    """
    n, length = samples.shape
    # In numpy: torch would start threads of its own here, beside those that train.
    ids = np.empty((n_rows, length + 1), np.int64)
    ids[:n, :length], ids[n:, :length] = samples, 0
    ids[:, length] = IGNORE
    return ids


def documents_of(tokens: Integers, eod_id: int) -> Integers:
    """Return which document of its sample each token is of, from 0: (..., S) -> (..., S).

    The token that ends a document belongs to it.
    """
    ends = tokens == eod_id
    found: Integers = np.cumsum(ends, axis=-1) - ends
    return found
