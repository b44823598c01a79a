"""The loss over the output head, in chunks of rows: no tensor of all logits ever exists.

For MPT-125M at 16 samples of 2,048 tokens the logits in fp32 would be 6.6 GB, and their gradient
as much again: the largest tensors of the whole step. A chunk needs a sixteenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpt.recipe.budget import HEAD_ROWS
from mpt.state import IGNORE, Loss


class LogitForm(NamedTuple):
    """What becomes of hidden @ weight.T, and what is asked of it."""

    factor: float = 1.0
    """Logits are multiplied by it."""
    cap: float | None = None
    """And then become cap * tanh(logit / cap)."""
    z_loss: float = 0.0
    """Weight of the square of the log-partition in the objective."""

    def apply(self, raw: Tensor) -> Tensor:
        """Return the logits, of the dtype of `raw`."""
        scaled = raw if self.factor == 1.0 else raw * self.factor
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def pull_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn a gradient by the logits into one by hidden @ weight.T."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap).square())
        return gradient if self.factor == 1.0 else gradient * self.factor


class Cost(NamedTuple):
    """What a chunk of positions costs; () fp32 each, and a gradient."""

    nats: Tensor
    penalty: Tensor
    d_raw: Tensor | None
    """Gradient of both by hidden @ weight.T, of its dtype: (chunk, V). None if nobody asked."""


ChunkCost = Callable[[Tensor, Tensor, LogitForm, bool], Cost]
"""`chunk_cost`, or what torch.compile makes of it."""


def summed_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, form: LogitForm, cost: ChunkCost
) -> Loss:
    """Return the cross-entropy of the logits against `targets`, summed over targets.

    Args:
        hidden: (B, S, D), any floating dtype.
        weight: (V, D), of the same dtype.
        targets: (B, S) int64; IGNORE takes no loss.
        cost: `chunk_cost`, which a compiler makes one pass over the logits instead of many.
    """
    flat = hidden.flatten(0, 1)
    objective, nats = _ChunkedLoss.apply(flat, weight, targets.flatten(), form, cost)
    return Loss(objective, nats)


def chunk_cost(raw: Tensor, targets: Tensor, form: LogitForm, wanted: bool) -> Cost:
    """Return the summed cross-entropy of a chunk, its z-loss, and if wanted their gradient.

    The gradient by logits is softmax minus one-hot, 0 in rows without loss; the z-loss, which is
    z * partition^2, adds 2 z partition times the softmax.

    Args:
        raw: hidden @ weight.T, (chunk, V).
        targets: (chunk,) int64; IGNORE takes no loss.
    """
    taken = targets != IGNORE
    at = targets.where(taken, 0)[:, None]  # (chunk, 1)
    logits = form.apply(raw.to(torch.promote_types(raw.dtype, torch.float32)))
    log_probabilities = torch.log_softmax(logits, dim=-1)
    hit = log_probabilities.gather(1, at)  # (chunk, 1)
    logit = logits.gather(1, at)
    counts = taken.to(hit.dtype)
    nats = -(hit[:, 0] * counts).sum()
    partition = (logit - hit)[:, 0] * counts  # log of the sum of exp(logits)
    penalty = form.z_loss * partition.square().sum()
    if not wanted:
        return Cost(nats, penalty, None)
    share = (counts * (1 + 2 * form.z_loss * partition))[:, None]
    d_raw = form.pull_back(log_probabilities.exp_().mul_(share), logits).to(raw.dtype)
    # In place of p - 1 in a narrow dtype, which would lose what a sure prediction is still off by.
    d_hit = form.pull_back(hit.exp() * share - counts[:, None], logit).to(raw.dtype)
    return Cost(nats, penalty, d_raw.scatter_(1, at, d_hit))


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, while the logits are there.

    The gradient of a sum of nats does not depend on what comes after, up to one factor; so the
    backward pass is a multiplication, and no logits are kept or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        form: LogitForm,
        cost: ChunkCost,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        penalty = torch.zeros_like(nats)
        d_hidden, d_weight = torch.empty_like(hidden) if wanted else None, None
        for start in range(0, len(targets), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            chunk = cost(hidden[part] @ weight.T, targets[part], form, wanted)
            nats += chunk.nats
            penalty += chunk.penalty
            if d_hidden is not None and chunk.d_raw is not None:
                torch.mm(chunk.d_raw, weight, out=d_hidden[part])
                d_weight = _added(d_weight, chunk.d_raw.T @ hidden[part])
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        objective = nats + penalty
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(
        ctx: Any, d_objective: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # A factor without dimensions is read in its own dtype, whatever it is multiplied with.
        d_weight = (d_weight * d_objective).to(ctx.weight_dtype)
        return d_hidden * d_objective, d_weight, None, None, None


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Add a chunk's gradient, in fp32 if there are several: a bf16 sum would lose the later ones.

    The first is taken as it is: for a large vocabulary these are the largest tensors of a step.
    """
    if total is None:
        return part
    exact = torch.promote_types(part.dtype, torch.float32)
    return total.to(exact).add_(part)
