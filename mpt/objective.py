"""What training minimises: the next token, in nats."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mpt.state import Microbatch

Objective = Callable[[nn.Module, Microbatch], Tensor]
"""-> nats summed over the target tokens of one microbatch, () fp32."""


def next_token_nats(model: nn.Module, microbatch: Microbatch) -> Tensor:
    """Return the cross-entropy of each next token, summed over targets: () fp32, in nats."""
    nats: Tensor = model(microbatch.tokens, microbatch.targets)
    return nats
