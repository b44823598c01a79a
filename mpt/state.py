"""The values that travel between floors during training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORE = -100
"""A target that takes no loss; torch's own default for cross-entropy."""


@dataclass(frozen=True)
class RunState:
    """All that a run is, beside weights and optimizer moments."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    samples: int = 0
    """Position in the data: samples consumed, over all ranks."""
    tokens: int = 0
    """Tokens read, over all ranks."""


@dataclass(frozen=True)
class Microbatch:
    """What one rank reads in one forward pass."""

    tokens: Tensor
    """(B, S) int64."""
    targets: Tensor
    """(B, S) int64; IGNORE where no loss is taken."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, as tensors on the device: reading one waits for it."""

    loss: Tensor
    """() fp32, nats per target token, mean over the global batch."""
    grad_norm: Tensor
    """() fp32, before clipping."""
    applied: Tensor
    """() bool; False if loss or gradient was not finite, so the weights were left alone."""
