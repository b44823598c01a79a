"""The loss over a tied output head, in chunks of rows: no tensor of all logits ever exists.

For MPT-125M at 1,024 tokens the logits in fp32 would be 206 MB, and their gradient as much
again: the largest tensors of the whole step. A chunk of 512 rows needs half of that in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpt.recipe.budget import HEAD_ROWS
from mpt.state import IGNORE


def summed_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T` against `targets`, summed over targets.

    Args:
        hidden: (B, S, D), any floating dtype.
        weight: (V, D), the tied embedding, of the same dtype.
        targets: (B, S) int64; IGNORE takes no loss.

    Returns:
        () fp32, in nats.
    """
    nats: Tensor = _ChunkedNats.apply(hidden.flatten(0, 1), weight, targets.flatten())
    return nats


class _ChunkedNats(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, while the logits are there.

    The gradient of a sum of nats does not depend on what comes after, up to one factor; so the
    backward pass is a multiplication, and no logits are kept or computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted else None
        # fp32: a bf16 sum over many chunks would lose what a single chunk adds.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        for rows in torch.arange(len(targets), device="cpu").split(HEAD_ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = (hidden[part] @ weight.T).float()  # (chunk, V)
            nats += _chunk_nats(logits, targets[part])
            if d_hidden is not None and d_weight is not None:
                d_logits = _chunk_gradient(logits, targets[part]).to(hidden.dtype)
                torch.mm(d_logits, weight, out=d_hidden[part])
                d_weight += d_logits.T @ hidden[part]
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, d_nats: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            (d_hidden.float() * d_nats).to(d_hidden.dtype),
            (d_weight * d_nats).to(ctx.weight_dtype),
            None,
        )


def _chunk_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target): () fp32."""
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def _chunk_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient of `_chunk_nats` by logits: softmax minus one-hot, 0 if ignored: (chunk, V)."""
    taken = targets != IGNORE
    gradient = torch.softmax(logits, dim=-1)
    gradient[torch.arange(len(targets), device=targets.device), targets.where(taken, 0)] -= 1
    return gradient.mul_(taken[:, None])
