"""One optimizer step. Read this file to know what training does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mpt.dist import sum_over_ranks
from mpt.objective import Objective
from mpt.optim import step_unless
from mpt.state import IGNORE, Microbatch, StepResult


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    objective: Objective,
    *,
    max_grad_norm: float,
    reduce_each: bool = False,
    loss_limit: float = math.inf,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepResult:
    """Take one optimizer step on this rank's share of the global batch.

    Loss is summed over target tokens and divided once, by the target tokens of the *global*
    batch. So the update depends neither on how the batch was cut into microbatches and
    ranks, nor on where padding fell.

    Args:
        model: sharded by `fully_shard`.
        microbatches: at least one, equally many on every rank.
        max_grad_norm: the global gradient norm is clipped to this.
        reduce_each: reduce gradients over ranks with every microbatch, so that a rank keeps its
            own shard of their sum; else once, with the last, for which it keeps all of it in fp32.
        loss_limit: a loss above it, in nats per target token, leaves the weights as they are;
            so does one that is not finite, or a gradient that is not.
        waiting: entered for the collective in which ranks meet that came to the step.

    Returns:
        Tensors on the device; nothing here waits for it.
    """
    counts = torch.stack([_count(microbatch) for microbatch in microbatches]).sum(dim=0)
    with waiting():
        sum_over_ranks(counts)
    n_targets, bad_samples = counts
    nats = torch.zeros((), device=n_targets.device)

    for i, microbatch in enumerate(microbatches):
        cast(FSDPModule, model).set_requires_gradient_sync(
            reduce_each or i == len(microbatches) - 1
        )
        part = objective(model, microbatch)
        # FSDP averages gradients over ranks; world_size turns that mean back into a sum.
        (part.objective * dist.get_world_size() / n_targets).backward()
        nats += part.nats

    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    grad_norm = cast(DTensor, norm).full_tensor()
    loss = sum_over_ranks(nats) / n_targets
    # Both are sums over all ranks, so every rank comes to the same verdict.
    bad = ~torch.isfinite(loss + grad_norm) | (loss > loss_limit)
    step_unless(optimizer, bad)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, ~bad, bad_samples)


def _count(microbatch: Microbatch) -> Tensor:
    """Return target tokens and skipped samples, (2,) int64, without waiting for the device."""
    n_targets = (microbatch.targets != IGNORE).sum()
    return torch.stack([n_targets, n_targets.new_full((), len(microbatch.skipped))])


def left_out() -> StepResult:
    """Return the result of a step that was not computed, because the ledger leaves it out."""
    nan = torch.tensor(math.nan)
    return StepResult(nan, nan, torch.tensor(False), torch.tensor(0))
