"""What every way of computing attention is given, and what it owes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


class Scores(NamedTuple):
    """How scores are made of queries and keys, and which of them count.

    A score is softcap(scale * q k) - slope * distance; it counts if the key is not later than
    the query, not more than `window` tokens before it, and of the same document.
    """

    scale: float
    slopes: Tensor | None = None
    """(H,) fp32: ALiBi's."""
    softcap: float | None = None
    """Scaled products s become softcap * tanh(s / softcap)."""
    window: int | None = None
    """Tokens before itself that a query sees; None: all."""
    documents: Tensor | None = None
    """(B, T) int64 for the T keys; the queries are the last of them."""
    dropout: float = 0.0
    """On the weights, after softmax."""
    mask: BlockMask | None = None
    """For FlexAttention: what `block_masks` gave for this window."""


Attend = Callable[[Tensor, Tensor, Tensor, Scores], Tensor]
"""(q, k, v, scores) -> out; q and out are (B, H, S, head_width), k and v (B, n_kv, T, head_width).
The queries are the last S of T tokens; query head h reads heads h // (H / n_kv) of k and v."""


def in_reach(n_queries: int, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Scores]:
    """Return keys and values without those that lie before the first query's window."""
    if scores.window is None or k.shape[2] <= n_queries + scores.window:
        return k, v, scores
    first = k.shape[2] - n_queries - scores.window
    if scores.documents is not None:
        scores = scores._replace(documents=scores.documents[:, first:])
    return k[:, :, first:], v[:, :, first:], scores


def bias(scores: Scores, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Return what is added to the scores of the last queries: fp32, -inf where a key is hidden.

    Returns:
        (B or 1, H or 1, n_queries, n_keys): whole only where documents or slopes make it differ.
    """
    # fp32 holds every place exactly, and a compiler makes fewer instructions of it than of int64.
    keys = torch.arange(n_keys, device=device, dtype=torch.float32)
    distance = keys[n_keys - n_queries :, None] - keys  # (n_queries, n_keys)
    hidden = distance < 0
    if scores.window is not None and n_keys > scores.window:
        hidden = hidden | (distance > scores.window)
    hidden = hidden[None, None]
    if scores.documents is not None:
        documents = scores.documents[:, None]  # (B, 1, n_keys)
        hidden = hidden | (documents[:, :, -n_queries:, None] != documents[:, :, None])
    if scores.slopes is None:
        return torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)
    decay = -scores.slopes[:, None, None] * distance  # (H, n_queries, n_keys)
    return torch.where(hidden, -math.inf, decay)
