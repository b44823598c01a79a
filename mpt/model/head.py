"""The loss over the output head, in chunks of rows: no tensor of all logits ever exists.

For MPT-125M at 1,024 tokens the logits in fp32 would be 206 MB, and their gradient as much
again: the largest tensors of the whole step. A chunk of 512 rows needs half of that in all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, form: LogitForm) -> Loss:
    """Return the cross-entropy of the logits against `targets`, summed over targets.

    Args:
        hidden: (B, S, D), any floating dtype.
        weight: (V, D), of the same dtype.
        targets: (B, S) int64; IGNORE takes no loss.
    """
    objective, nats = _ChunkedLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), form)
    return Loss(objective, nats)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, while the logits are there.

    The gradient of a sum of nats does not depend on what comes after, up to one factor; so the
    backward pass is a multiplication, and no logits are kept or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, form: LogitForm
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        penalty = torch.zeros_like(nats)
        d_hidden = torch.empty_like(hidden) if wanted else None
        # fp32: a bf16 sum over many chunks would lose what a single chunk adds.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        for start in range(0, len(targets), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = form.apply((hidden[part] @ weight.T).float())  # (chunk, V)
            nats += F.cross_entropy(logits, targets[part], ignore_index=IGNORE, reduction="sum")
            partition = _partition(logits, targets[part], form)
            if partition is not None:
                penalty += form.z_loss * partition.square().sum()
            if d_hidden is not None and d_weight is not None:
                gradient = _gradient(logits, targets[part], partition, form)
                d_logits = form.pull_back(gradient, logits).to(hidden.dtype)
                torch.mm(d_logits, weight, out=d_hidden[part])
                d_weight += d_logits.T @ hidden[part]
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        objective = nats + penalty
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(ctx: Any, d_objective: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            (d_hidden.float() * d_objective).to(d_hidden.dtype),
            (d_weight * d_objective).to(ctx.weight_dtype),
            None,
            None,
        )


def _partition(logits: Tensor, targets: Tensor, form: LogitForm) -> Tensor | None:
    """Log of the sum of exp(logits), 0 where no loss is taken: (chunk,); None if nobody asks."""
    if form.z_loss == 0.0:
        return None
    return torch.logsumexp(logits, dim=-1) * (targets != IGNORE)


def _gradient(logits: Tensor, targets: Tensor, partition: Tensor | None, form: LogitForm) -> Tensor:
    """Gradient of the objective by logits, 0 in rows without loss: (chunk, V).

    Softmax minus one-hot; and of z * partition^2, 2 z partition times the softmax.
    """
    taken = targets != IGNORE
    gradient = torch.softmax(logits, dim=-1)
    if partition is not None:
        gradient *= (1 + 2 * form.z_loss * partition)[:, None]
    gradient[torch.arange(len(targets), device=targets.device), targets.where(taken, 0)] -= 1
    return gradient.mul_(taken[:, None])
