"""Attention by FlexAttention: one fused kernel on a GPU, whatever the options."""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mpt.model.scores import Scores
from mpt.model.sdpa import attend_sdpa

BLOCK = 128
"""Queries and keys in a tile of the mask; torch's own default, which its kernels are tuned for."""
KERNELS = 64
"""Variants of FlexAttention that one process may compile."""

Kernel = Callable[..., Tensor]
Mod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_flex(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attend by FlexAttention, with the mask that `block_masks` made for this window.

    A single query has no mask, and nothing to gain: it goes the way of the reference.
    """
    if scores.mask is None:
        assert q.shape[2] == 1, "more than one query needs a mask"
        return attend_sdpa(q, k, v, scores)
    assert scores.dropout == 0.0, "FlexAttention has no dropout"
    if torch.compiler.is_compiling():
        kernel: Kernel = flex_attention
    else:
        kernel = _compiled(q.device.type)
    return kernel(
        q,
        k,
        v,
        score_mod=_score_mod(scores),
        block_mask=scores.mask,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def block_masks(
    documents: Tensor | None,
    start: int,
    stop: int,
    windows: Set[int | None],
    device: torch.device,
) -> dict[int | None, BlockMask]:
    """Return the mask of each window for queries start to stop - 1 of keys 0 to stop - 1."""
    if stop - start == 1:
        return {}
    if documents is None:
        return {window: _shared_mask(stop - start, stop, window, device) for window in windows}
    return {window: _mask(stop - start, stop, window, device, documents) for window in windows}


@lru_cache(maxsize=32)  # a model's windows, times a few lengths
def _shared_mask(
    n_queries: int, n_keys: int, window: int | None, device: torch.device
) -> BlockMask:
    # An evaluation may be the first to ask, and what is made in inference mode cannot be trained
    # with later.
    with torch.inference_mode(False):
        return _mask(n_queries, n_keys, window, device, None)


def _mask(
    n_queries: int,
    n_keys: int,
    window: int | None,
    device: torch.device,
    documents: Tensor | None,
) -> BlockMask:
    """Return which tiles of (queries, keys) are seen in whole and which in part.

    By arithmetic on the tiles' corners: torch's `create_block_mask` looks at each pair of tokens,
    4 GiB of them at 65,536 tokens. Where documents have ids in rising order it finds the same
    tiles; in a mixed order some are looked into that show nothing.
    """
    before = n_keys - n_queries
    query = torch.arange(before, n_keys, BLOCK, device=device)[:, None]  # a tile's first
    key = torch.arange(0, n_keys, BLOCK, device=device)
    last_query, last_key = query + BLOCK - 1, key + BLOCK - 1
    seen = key <= last_query
    # A tile that hangs over the edge is never whole, as in torch.
    whole = (last_key <= query) & (last_query < n_keys)
    if window is not None:
        seen = seen & (query - last_key <= window)
        whole = whole & (last_query - key <= window)
    seen, whole = seen[None], whole[None]  # (B or 1, tiles of queries, tiles of keys)
    if documents is not None:
        low, high = (edge[:, :, None] for edge in _range(documents[:, before:]))
        key_low, key_high = (edge[:, None] for edge in _range(documents))
        seen = seen & (low <= key_high) & (key_low <= high)
        whole = whole & (low == high) & (key_low == key_high)  # and seen, so of the same one
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(seen & whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(before, window, device, documents),
        seq_lengths=(n_queries, n_keys),
    )


def _range(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest document in each tile: 2 x (B, tiles)."""
    n_samples, n_tokens = documents.shape
    rest = documents[:, -1:].expand(n_samples, -n_tokens % BLOCK)
    tiles = torch.cat([documents, rest], dim=1).view(n_samples, -1, BLOCK)
    return tiles.amin(-1), tiles.amax(-1)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles of keys each tile of queries has, and which, those first."""
    tiles = tiles[:, None].int()  # (B or 1, 1, tiles of queries, tiles of keys)
    which = tiles.argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), which.int()


def _visible(
    before: int, window: int | None, device: torch.device, documents: Tensor | None
) -> Visible:
    """Return whether a query sees a key, for the tiles that are seen in part.

    Numbers go in as tensors: a kernel reads those, where torch would compile one for each number.
    """
    offset = torch.full((), before, dtype=torch.int32, device=device)
    reach = None
    if window is not None:
        reach = torch.full((), window, dtype=torch.int32, device=device)

    def visible(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        seen = distance >= 0
        if reach is not None:
            seen = seen & (distance <= reach)
        if documents is not None:
            seen = seen & (documents[sample, query + offset] == documents[sample, key])
        return seen

    return visible


def _score_mod(scores: Scores) -> Mod | None:
    """Return what becomes of a scaled product: soft cap, then ALiBi."""
    slopes, softcap = scores.slopes, scores.softcap
    if slopes is None and softcap is None:
        return None

    def modified(score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            # Queries count from the first of them, not from the first key: that adds the same to
            # all scores of a query, which softmax does not see.
            score = score - slopes[head] * (query - key)
        return score

    return modified


@cache
def _compiled(device: str) -> Kernel:
    """FlexAttention for a caller that is not compiled itself: fused on a GPU, plain on a CPU."""
    # One each for training and evaluation, every length and kind of mask: torch thinks that more
    # than 8 must be a mistake, and past that computes attention unfused.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)
    backend = "inductor" if device == "cuda" else "eager"
    kernel: Kernel = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)
    return kernel
