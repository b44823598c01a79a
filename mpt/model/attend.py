"""Causal attention: one signature, several ways to compute it."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mpt.model import flex
from mpt.model.blocks import attend_blocks
from mpt.model.scores import Attend, Scores
from mpt.model.sdpa import attend_sdpa
from mpt.model.wide import attend_wide
from mpt.recipe.attention import Backend

__all__ = ["Attend", "Backend", "Scores", "attend_with", "block_masks"]


def attend_with(backend: Backend) -> Attend:
    """Return the function that computes attention by `backend`."""
    match backend:
        case "sdpa":
            return attend_sdpa
        case "blocks":
            return attend_blocks
        case "wide":
            return attend_wide
        case "flex":
            return flex.attend_flex
        case "flash":
            from mpt.model.flash import attend_flash  # needs a package that few have

            return attend_flash


def block_masks(
    backend: Backend,
    documents: Tensor | None,
    start: int,
    stop: int,
    windows: Set[int | None],
    device: torch.device,
) -> dict[int | None, BlockMask]:
    """Return what FlexAttention wants to know beforehand, by window; nothing for other backends."""
    return flex.block_masks(documents, start, stop, windows, device) if backend == "flex" else {}
