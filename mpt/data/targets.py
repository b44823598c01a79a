"""What a model reads, and what it is to say: samples, and the same one token on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.state import IGNORE

Integers = NDArray[np.int64]


def with_targets(samples: NDArray[Any], n_rows: int) -> tuple[Integers, Integers]:
    """Return tokens and targets, (n_rows, S) each, written once.

    Args:
        samples: (n, S) of any integer type, n <= n_rows; rows beyond them are zeros, and ignored.
    """
    n, length = samples.shape
    # In numpy: torch would start threads of its own here, beside those that train.
    tokens = np.empty((n_rows, length), np.int64)
    targets = np.empty_like(tokens)
    tokens[:n], tokens[n:] = samples, 0
    targets[:n, :-1], targets[:n, -1] = samples[:, 1:], IGNORE  # the last token has no next one
    targets[n:] = IGNORE
    return tokens, targets
