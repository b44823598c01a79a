"""Activation checkpointing: what a block keeps for its backward pass, and what it makes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mpt.recipe.activations import Recompute

T = TypeVar("T")

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,  # what products in 8 bits are
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
"""What costs most to make again for what it takes to keep. Not batched products: the scores of
an attention that is not fused are the largest tensors of a block."""

_KEPT_IF_INSTALLED = {"flash_attn._flash_attn_forward.default"}


def recomputed(how: Recompute, run: Callable[..., T], *args: Any, has_dropout: bool) -> T:
    """Return `run(*args)`, keeping for its backward pass what `how` says.

    Args:
        has_dropout: whether `run` draws random numbers, which must be the same again.
    """
    if how == "none":
        return run(*args)
    if how == "full":  # with no context_fn at all: torch.compile cannot look through a no-op one
        all_again: T = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=has_dropout)
        return all_again
    some_again: T = checkpoint(
        run, *args, use_reentrant=False, preserve_rng_state=has_dropout, context_fn=_selective
    )
    return some_again


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _KEPT or str(operation) in _KEPT_IF_INSTALLED
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_selective = partial(create_selective_checkpoint_contexts, _policy)
