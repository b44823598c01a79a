"""ALiBi as four more dimensions of each head, for torch's fused causal kernel: long samples on CPU.

A kernel that takes a bias reads one number for each pair of tokens. But slope * distance is a sum
of a part of the query alone, which softmax does not see, and slope * place of the key: a product
of two vectors like any other. From about 1,024 tokens on this beats blocks of queries, and it
keeps nothing for each pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpt.model.scores import Scores
from mpt.model.sdpa import attend_sdpa

_FAST_MULTIPLE = 16
"""Widths of a head that are no multiple of this are slower."""
_PLACES = 128
"""A place is so many times a number, and a rest: bf16 holds either exactly up to 32,768 tokens."""


def attend_wide(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attend with ALiBi folded into queries and keys; what that cannot do, torch's kernel does."""
    alone = scores.window is None and scores.documents is None and scores.softcap is None
    slopes = scores.slopes
    if slopes is None or not alone or scores.dropout > 0 or q.shape[2] != k.shape[2]:
        return attend_sdpa(q, k, v, scores)
    place = torch.arange(k.shape[2], device=k.device)
    places = torch.stack([place // _PLACES * _PLACES, place % _PLACES], dim=-1)  # (T, 2)
    # A slope is a sum of two numbers as well, since bf16 holds 8 bits of each.
    exact = slopes / scores.scale
    first = exact.to(q.dtype).to(exact.dtype)
    halves = torch.stack([first, first, exact - first, exact - first], dim=-1)  # (H, 4)
    width = v.shape[3] + 4
    width += -width % _FAST_MULTIPLE
    wide_q = torch.cat([q, halves[:, None].to(q.dtype).expand(*q.shape[:3], 4)], dim=-1)
    wide_k = torch.cat([k, places.repeat(1, 2).to(k.dtype).expand(*k.shape[:3], 4)], dim=-1)
    padded_q, padded_k, padded_v = (F.pad(t, (0, width - t.shape[3])) for t in (wide_q, wide_k, v))
    out = F.scaled_dot_product_attention(
        padded_q,
        padded_k,
        padded_v,
        is_causal=True,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., : v.shape[3]]
