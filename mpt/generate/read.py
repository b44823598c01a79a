"""What a network expects after each text of a batch, with what it read before kept in a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpt.errors import CheckpointError
from mpt.model.cache import PADDING, Cache
from mpt.model.network import MPT

_AT_ONCE = 512
"""Tokens of a prompt: the scores of so many against all that were before must fit in memory."""


def read_anew(network: MPT, texts: Sequence[Sequence[int]], capacity: int) -> tuple[Cache, Tensor]:
    """Read whole texts, none of them empty.

    Returns:
        A cache that holds them, with room for `capacity` tokens of each; the logits of what
        follows them, (B, V) fp32 on the CPU.

    Raises:
        CheckpointError: if the logits are not finite.
    """
    different = list(dict.fromkeys(map(tuple, texts)))  # samples of a prompt begin as one
    longest = max(map(len, different))
    gaps = [longest - len(text) for text in different]
    device, dtype = network.head.device, network.head.dtype
    tokens = torch.tensor([[0] * n + [*t] for n, t in zip(gaps, different, strict=True)])
    documents = None
    if any(gaps):  # the shorter ones are padded on the left, where nobody looks
        documents = torch.tensor([[PADDING] * n + [0] * (longest - n) for n in gaps]).to(device)
    cache = Cache(network.transformer.cfg, len(different), capacity, device, dtype)
    logits = _read(network, tokens.to(device), documents, cache)
    if len(different) < len(texts):
        rows = [different.index(tuple(text)) for text in texts]
        cache.keep(rows)
        logits = logits[rows]
    return cache, logits


def read_on(network: MPT, ids: Sequence[int], cache: Cache) -> Tensor:
    """Read one more id of each text; return the logits of what follows, as `read_anew` does."""
    return _read(network, torch.tensor(ids, device=network.head.device)[:, None], None, cache)


@torch.inference_mode()
def _read(network: MPT, tokens: Tensor, documents: Tensor | None, cache: Cache) -> Tensor:
    """Read tokens (B, S) without dropout; return the logits of what follows, (B, V)."""
    was_training = network.training
    if was_training:
        network.eval()
    for start in range(0, tokens.shape[1], _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        of = None if documents is None else documents[:, part]
        hidden = network.transformer(tokens[:, part], of, cache)  # (B, part, D)
    logits = network.logits(hidden[:, -1]).float().cpu()  # (B, V)
    if was_training:
        network.train()
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("the model's logits are not finite; its weights are damaged.")
    return logits
