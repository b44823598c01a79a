"""Attention by torch's own kernel, and by two plain products: right on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpt.model.scores import Scores, bias, in_reach


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attend through torch's own kernel, with an additive bias where one is needed.

    The reference. Without ALiBi, window and documents there is no bias, and torch takes its
    fused causal kernel. A soft cap comes between the product and the bias, which no kernel of
    torch's does, so there it is two products.
    """
    k, v, scores = in_reach(q.shape[2], k, v, scores)
    if scores.softcap is not None:
        return attend_by_products(q, k, v, scores)
    if q.shape[2] == 1:
        return _one_query(q, k, v, scores)
    causal = _only_causal(scores, k.shape[2]) and q.shape[2] == k.shape[2]
    mask = None if causal else bias(scores, q.shape[2], k.shape[2], q.device).to(q.dtype)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        dropout_p=scores.dropout,
        is_causal=causal,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attend by a product, a softmax in fp32 and a product, all scores in memory."""
    n_groups, n_queries, n_keys = k.shape[1], q.shape[2], k.shape[2]
    # Query heads that share a head of keys lie one after another: each group is one product.
    together = q.reshape(q.shape[0], n_groups, -1, q.shape[3]) * scores.scale
    products = (together @ k.transpose(-2, -1)).view(*q.shape[:3], n_keys)
    products = products.to(torch.promote_types(q.dtype, torch.float32))
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    weights = (products + bias(scores, n_queries, n_keys, q.device)).softmax(-1).to(v.dtype)
    weights = F.dropout(weights, scores.dropout).view(q.shape[0], n_groups, -1, n_keys)
    return (weights @ v).view(q.shape)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attend from the last token alone, which sees all but other documents.

    Query heads that share a head of keys become queries of that head: torch would first copy
    the keys for each of them, and here keys are all there is to read.
    """
    n_heads, n_groups, n_keys = q.shape[1], k.shape[1], k.shape[2]
    mask = None
    if not _only_causal(scores, n_keys):
        mask = bias(scores, 1, n_keys, q.device).to(q.dtype)  # (B or 1, H or 1, 1, T)
        if mask.shape[1] == n_heads:
            mask = mask.reshape(mask.shape[0], n_groups, -1, n_keys)
    together = q.reshape(q.shape[0], n_groups, -1, q.shape[3])
    out = F.scaled_dot_product_attention(
        together, k, v, mask, dropout_p=scores.dropout, scale=scores.scale
    )
    return out.reshape(q.shape)


def _only_causal(scores: Scores, n_keys: int) -> bool:
    """Whether queries see every key up to themselves, and all alike."""
    whole = scores.window is None or scores.window >= n_keys - 1
    return scores.slopes is None and scores.documents is None and whole
