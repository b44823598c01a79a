"""Held-out loss: the same objective on samples that training never reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from mpt.dist import any_rank, sum_over_ranks
from mpt.errors import DataError
from mpt.objective import Objective
from mpt.state import IGNORE, Microbatch


def evaluate(
    model: nn.Module,
    batches: Iterable[Microbatch],
    objective: Objective,
    device: torch.device,
    *,
    stop: Callable[[], bool],
    beat: Callable[[], None],
) -> float | None:
    """Return the mean loss over all target tokens of all ranks, in nats per target token.

    Every rank must bring equally many batches: each forward pass gathers weights.

    Args:
        stop: asked before each batch; once it holds on any rank, the result is None on all.
        beat: called before each batch.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    n_targets = torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                beat()
                if any_rank(stop()):
                    return None
                nats += objective(model, batch).nats
                n_targets += (batch.targets != IGNORE).sum()
    finally:
        model.train()
    total = int(sum_over_ranks(n_targets))
    if total == 0:
        raise DataError("evaluation has no target tokens; data.eval needs at least one sample.")
    return float(sum_over_ranks(nats)) / total


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """Turn nats per token into bits per UTF-8 byte, which does not depend on the tokenizer."""
    return loss / math.log(2) * tokens_per_byte
