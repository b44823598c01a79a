"""Causal attention with ALiBi: one signature, several ways to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpt.recipe.budget import QUERY_BLOCK

Backend = Literal["sdpa", "blocks"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]
"""(q, k, v, slopes, scale, dropout) -> out; q, k, v, out are (B, H, S, head_dim), slopes (H,)."""


def choose_backend(device: torch.device) -> Backend:
    """Return the fastest backend for training with ALiBi on `device`."""
    return "blocks" if device.type == "cpu" else "sdpa"


def attend_with(backend: Backend) -> Attend:
    """Return the function that computes attention by `backend`."""
    match backend:
        case "sdpa":
            return attend_sdpa
        case "blocks":
            return attend_blocks


def attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, dropout: float
) -> Tensor:
    """Attend through torch's own kernel with an additive bias. The reference, on any device."""
    bias = _bias(slopes, 0, q.shape[2], k.shape[2]).to(q.dtype)  # (H, S, S)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=scale)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, dropout: float
) -> Tensor:
    """Attend in blocks of queries, each of which sees only the keys up to its own end.

    That skips the upper triangle, which a kernel with a bias mask computes and throws away.
    """
    if dropout == 0.0:
        whole: Tensor = _Blocks.apply(q, k, v, slopes, scale)
        return whole
    out = []
    for start, stop in _query_blocks(q.shape[2]):
        scores = (q[:, :, start:stop] * scale) @ k[:, :, :stop].transpose(-2, -1)
        weights = torch.softmax(scores + _bias(slopes, start, stop, stop), dim=-1).to(v.dtype)
        out.append(F.dropout(weights, dropout) @ v[:, :, :stop])
    return torch.cat(out, dim=2)


class _Blocks(torch.autograd.Function):
    """Attention in query blocks with its own backward pass: half the time of autograd's.

    It keeps the attention weights in the compute dtype, never the fp32 scores, and writes each
    gradient into place instead of padding and adding one per block.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float
    ) -> Tensor:  # 3 x (B, H, S, head_dim) -> (B, H, S, head_dim)
        q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
        out, keys = torch.empty_like(q), k.transpose(-2, -1)
        kept = []
        for start, stop in _query_blocks(q.shape[2]):
            scores = (q[:, :, start:stop] @ keys[..., :stop]).float()  # (B, H, block, stop)
            scores += _bias(slopes, start, stop, stop)
            weights = torch.softmax(scores, dim=-1).to(v.dtype)
            out[:, :, start:stop] = weights @ v[:, :, :stop]
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_q = torch.empty_like(q)
        # fp32: a key is seen by many blocks, and a bf16 sum would lose the later ones.
        d_k, d_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        for weights, (start, stop) in zip(kept, _query_blocks(q.shape[2]), strict=True):
            d_block = d_out[:, :, start:stop]
            d_v[:, :, :stop] += weights.transpose(-2, -1) @ d_block
            d_weights = d_block @ v[:, :, :stop].transpose(-2, -1)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[:, :, start:stop] = (d_scores @ k[:, :, :stop]) * ctx.scale
            d_k[:, :, :stop] += d_scores.transpose(-2, -1) @ q[:, :, start:stop]
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _query_blocks(n_queries: int) -> list[tuple[int, int]]:
    """Return the first and one past the last query of each block."""
    starts = range(0, n_queries, QUERY_BLOCK)
    return [(start, min(start + QUERY_BLOCK, n_queries)) for start in starts]


def _bias(slopes: Tensor, first_query: int, stop_query: int, n_keys: int) -> Tensor:
    """Return what is added to the scores: fp32 (H, queries, keys), -inf where a key is later."""
    queries = torch.arange(first_query, stop_query, device=slopes.device)
    keys = torch.arange(n_keys, device=slopes.device)
    distance = queries[:, None] - keys  # (queries, keys)
    decay = -slopes[:, None, None] * distance
    return decay.masked_fill(distance < 0, -math.inf)
