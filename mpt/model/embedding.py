"""Looking up token embeddings, with a gradient that loses nothing to bf16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def look_up(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the embedding of each token: (B, S), (V, D) -> (B, S, D).

    The gradient of a row is a sum over all places its token stands at. On CPU torch adds it up
    in the dtype of the weight; in bf16 a frequent token then loses what comes late.
    """
    out: Tensor = _Lookup.apply(tokens, weight)
    return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.n_rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        d_weight = torch.ops.aten.embedding_dense_backward(
            d_out.float(), tokens, ctx.n_rows, -1, False
        )
        return None, d_weight.to(ctx.dtype)
