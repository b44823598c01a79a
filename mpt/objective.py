"""What training minimises: the next token, in nats."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mpt.state import Loss, Microbatch

Objective = Callable[[nn.Module, Microbatch], Loss]
"""-> the loss of one microbatch, summed over its target tokens."""


def next_token_loss(model: nn.Module, microbatch: Microbatch) -> Loss:
    """Return the cross-entropy of each next token, summed over targets, in nats."""
    loss: Loss = model(microbatch.tokens, microbatch.targets, microbatch.documents)
    return loss
