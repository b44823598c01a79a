"""Attention in plain torch, and the options to cross: what every backend is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpt.model.position import alibi_slopes
from mpt.model.scores import Scores

B, H = 2, 6
SCALE = 0.3


@dataclass(frozen=True)
class Options:
    """What a model asks of attention."""

    alibi: bool = True
    n_kv: int = H
    window: int | None = None
    softcap: float | None = None
    documents: bool = False

    def scores(self, n_keys: int, device: str = "cpu") -> Scores:
        """Return what a backend is told, its mask aside."""
        slopes = alibi_slopes(H).to(device) if self.alibi else None
        documents = packed(n_keys).to(device) if self.documents else None
        return Scores(SCALE, slopes, self.softcap, self.window, documents)


EACH = {
    "alibi": Options(),
    "nothing": Options(alibi=False),
    "grouped": Options(n_kv=2),
    "multi-query": Options(alibi=False, n_kv=1),
    "window": Options(window=150),
    "narrow window": Options(alibi=False, window=3),
    "softcap": Options(softcap=0.7),
    "documents": Options(documents=True),
    "all": Options(n_kv=2, window=40, softcap=0.7, documents=True),
    "all but softcap": Options(n_kv=3, window=140, documents=True),
    "all but alibi": Options(alibi=False, n_kv=1, window=70, softcap=2.0, documents=True),
}


def plain(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Softmax of capped, scaled products minus slope times distance, what is hidden left out."""
    S, T = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    products = q @ k.transpose(-2, -1) * scores.scale
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    distance = (torch.arange(T - S, T)[:, None] - torch.arange(T)).to(q.device)
    if scores.slopes is not None:
        products = products - scores.slopes.to(q.dtype)[:, None, None] * distance
    hidden = distance < 0
    if scores.window is not None:
        hidden = hidden | (distance > scores.window)
    if scores.documents is not None:
        same = scores.documents[:, T - S :, None] == scores.documents[:, None, :]
        hidden = hidden | ~same[:, None]
    return products.masked_fill(hidden, -math.inf).softmax(-1) @ v


def packed(n_keys: int) -> Tensor:
    """Return documents of uneven lengths, other ones in each sample: (B, T) int64."""
    generator = torch.Generator().manual_seed(n_keys)
    begins = torch.rand(B, n_keys, generator=generator) < 1 / 60
    return begins.long().cumsum(dim=1)


def inputs(
    S: int, T: int, n_kv: int, dtype: torch.dtype, width: int = 8, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values that want a gradient, the same in every dtype."""
    generator = torch.Generator().manual_seed(S + T)
    shapes = (B, H, S, width), (B, n_kv, T, width), (B, n_kv, T, width)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for shape in shapes
    )
    return q, k, v


def gradients(out: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients, in float64, of the output weighted by fixed random numbers."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
    return tuple(g.double() for g in torch.autograd.grad((out.double() * weight).sum(), of))
