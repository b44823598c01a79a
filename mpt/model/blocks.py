"""Attention in blocks of queries, each with the keys that it can see: for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpt.model.scores import Scores, bias, in_reach
from mpt.model.sdpa import attend_by_products
from mpt.recipe.budget import QUERY_BLOCK


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attend in blocks of queries, each of which sees only the keys up to its own end.

    That skips the upper triangle, which a kernel with a bias mask computes and throws away, and
    with a window the keys before it as well.
    """
    if scores.dropout == 0.0 and scores.softcap is None:
        whole: Tensor = _Blocks.apply(
            q, k, v, scores.slopes, scores.documents, scores.window, scores.scale
        )
        return whole
    out = []
    for start, stop, _, last in _blocks(q.shape[2], k.shape[2], None):
        seen = in_reach(stop - start, k[:, :, :last], v[:, :, :last], _between(0, last, scores))
        out.append(attend_by_products(q[:, :, start:stop], *seen))
    return torch.cat(out, dim=2)


class _Blocks(torch.autograd.Function):
    """Attention in query blocks with its own backward pass: half the time of autograd's.

    It keeps the attention weights in the compute dtype, never the fp32 scores, and writes each
    gradient into place instead of padding and adding one per block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        documents: Tensor | None,
        window: int | None,
        scale: float,
    ) -> Tensor:  # (B, H, S, head_width), 2 x (B, n_kv, T, head_width) -> (B, H, S, head_width)
        scores = Scores(scale, slopes, window=window, documents=documents)
        q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
        out, keys, n_groups = torch.empty_like(q), k.transpose(-2, -1), k.shape[1]
        kept = []
        for start, stop, first, last in _blocks(q.shape[2], k.shape[2], window):
            products = _grouped(q[:, :, start:stop], n_groups) @ keys[..., first:last]
            shape = (*q.shape[:2], stop - start, last - first)
            # .to, not .float: what comes in fp64 is computed in fp64
            seen = products.view(shape).to(torch.promote_types(q.dtype, torch.float32))
            seen += bias(_between(first, last, scores), stop - start, last - first, q.device)
            weights = _grouped(torch.softmax(seen, dim=-1).to(v.dtype), n_groups)
            part = weights @ v[:, :, first:last]  # (B, n_kv, H / n_kv * block, head_width)
            out[:, :, start:stop] = part.view(*q.shape[:2], stop - start, -1)
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        d_out, n_groups = d_out.contiguous(), k.shape[1]
        d_q = torch.empty_like(q)
        # At least fp32: a key is seen by many blocks, and a bf16 sum would lose the later ones.
        exact = torch.promote_types(q.dtype, torch.float32)
        d_k, d_v = (torch.zeros_like(t, dtype=exact) for t in (k, v))
        blocks = _blocks(q.shape[2], k.shape[2], ctx.window)
        for weights, (start, stop, first, last) in zip(kept, blocks, strict=True):
            d_block = _grouped(d_out[:, :, start:stop], n_groups)
            d_v[:, :, first:last] += weights.transpose(-2, -1) @ d_block
            d_weights = d_block @ v[:, :, first:last].transpose(-2, -1)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_part = (d_scores @ k[:, :, first:last]) * ctx.scale
            d_q[:, :, start:stop] = d_part.view(*q.shape[:2], stop - start, -1)
            part = _grouped(q[:, :, start:stop], n_groups)
            d_k[:, :, first:last] += d_scores.transpose(-2, -1) @ part
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


def _blocks(n_queries: int, n_keys: int, window: int | None) -> list[tuple[int, int, int, int]]:
    """Return of each block its first query, one past its last, and the same of the keys it sees."""
    before = n_keys - n_queries  # keys that lie in a cache
    blocks = []
    for start in range(0, n_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n_queries)
        first = 0 if window is None else max(0, before + start - window)
        blocks.append((start, stop, first, before + stop))
    return blocks


def _grouped(heads: Tensor, n_groups: int) -> Tensor:
    """Put query heads that share a head of keys one after another, as queries of that head.

    (B, H, queries, width) -> (B, n_kv, H / n_kv * queries, width); where no head shares, the same.
    """
    return heads.reshape(heads.shape[0], n_groups, -1, heads.shape[3])


def _between(first: int, last: int, scores: Scores) -> Scores:
    """Scores of which only keys first to last - 1 are at hand."""
    if scores.documents is None:
        return scores
    return scores._replace(documents=scores.documents[:, first:last])
