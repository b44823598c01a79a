"""Which way of computing attention a model takes on a device, and why: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from mpt.errors import UsageError
from mpt.recipe.activations import Attention, Precision
from mpt.recipe.model import Model
from mpt.recipe.problem import Problem
from mpt.recipe.size import kinds

Backend = Attention
Device = Literal["cpu", "cuda"]

FLASH_FROM, FLASH_BELOW = (2, 7), (3, 0)
"""Versions of flash-attn: from 2.7 torch.compile can look through it; 3 has no ALiBi."""
FLASH_WIDEST = 256
"""Width of a head that flash-attn's kernels go up to."""
WIDEST_PLACE = 1 << 15
"""Tokens whose places in a sample bf16 can hold as the sum of two numbers."""
FLEX_NARROWEST = 16
"""Width of a head that FlexAttention's kernels begin at: Triton multiplies no smaller tiles."""
FUSED_FROM = 1024
"""Tokens in a sample from which torch's fused kernel beats query blocks on a CPU, where there is
no bias to add: it took 0.5 to 0.9 of the time there, and 0.9 to 1.3 at 512 tokens."""


@dataclass(frozen=True)
class Choice:
    """A way of computing attention that can do a model on a device."""

    backend: Backend
    why: str
    """A phrase that says what it is and why it was taken."""

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}"


def choose(
    wanted: Backend | Literal["auto"],
    model: Model,
    device: Device,
    *,
    flash_installed: bool,
    precision: Precision,
) -> Choice:
    """Return how attention is computed in training.

    Raises:
        UsageError: what is wanted by name cannot do this model here.
    """
    automatic = next(
        choice
        for choice in _by_preference(model, device)
        if _obstacle(choice.backend, model, device, flash_installed, precision) is None
    )
    if wanted == "auto":
        return automatic
    obstacle = _obstacle(wanted, model, device, flash_installed, precision)
    if obstacle is not None:
        fix = f"use `auto`, which takes {automatic.backend} here."
        raise UsageError(str(Problem("train.attention", f"{wanted} {obstacle}.", fix)))
    return Choice(wanted, f"{_WHAT[wanted]}, as train.attention says")


def flash_is_installed() -> bool:
    """Return whether there is a flash-attn that we can use; nothing is imported."""
    try:
        major, minor = version("flash-attn").split(".")[:2]
        return FLASH_FROM <= (int(major), int(minor)) < FLASH_BELOW
    except (PackageNotFoundError, ValueError):
        return False


_WHAT: dict[Backend, str] = {
    "sdpa": "torch's own kernel",
    "blocks": "products over blocks of queries",
    "wide": "torch's fused causal kernel with ALiBi as more dimensions of a head",
    "flex": "FlexAttention",
    "flash": "flash-attn's kernel",
}


def _by_preference(model: Model, device: Device) -> Iterator[Choice]:
    """Yield what may be taken, the fastest first; the last can do everything."""
    fused = Choice("sdpa", "torch's fused causal kernel, with no bias to add")
    if device == "cpu":
        if model.max_seq_len >= FUSED_FROM:
            if not _needs_bias(model) and not model.attn_pdrop:
                yield fused
            yield Choice("wide", "a fused causal kernel with ALiBi as more dimensions of a head")
        yield Choice("blocks", "causal, in blocks of queries, the fastest on a CPU for this model")
    yield Choice("flash", "flash-attn is installed and can do this model")
    if not _needs_bias(model):
        yield fused
    yield Choice("flex", "FlexAttention, one fused kernel with bias and mask")
    yield Choice("sdpa", "torch's own kernel with a bias, for nothing faster can do this model")


def _needs_bias(model: Model) -> bool:
    """Whether scores are more than scaled products of what is not later."""
    windows = any(layer.window is not None for layer in kinds(model))
    capped = model.attn_logit_softcapping is not None
    return model.alibi or model.attn_uses_sequence_id or windows or capped


def _obstacle(
    backend: Backend, model: Model, device: Device, flash_installed: bool, precision: Precision
) -> str | None:
    """Say why a backend cannot train this model here, as the rest of a sentence that it begins."""
    match backend:
        case "sdpa":
            return None
        case "blocks":
            if device != "cpu":
                return "is made for CPUs; on a GPU it starts a row of kernels for each block"
        case "wide":
            return _wide_obstacle(model, device)
        case "flex":
            return _flex_obstacle(model, device)
        case "flash":
            return _flash_obstacle(model, device, flash_installed, precision)
    return None


def _wide_obstacle(model: Model, device: Device) -> str | None:
    if device != "cpu":
        return "is made for CPUs; on a GPU it gains nothing over flex"
    if not model.alibi:
        return "is a way of computing ALiBi, which this model has not"
    if model.attn_pdrop > 0:
        return f"has no dropout, and model.attn_pdrop is {model.attn_pdrop}"
    if _needs_bias(replace(model, alibi=False)):
        return "does no window, no soft cap, and does not keep documents apart"
    if model.max_seq_len > WIDEST_PLACE:
        return f"is exact up to {WIDEST_PLACE:,} tokens, not {model.max_seq_len:,}"
    return None


def _flex_obstacle(model: Model, device: Device) -> str | None:
    if device == "cpu":
        return "has no backward pass on a CPU"
    if model.attn_pdrop > 0:
        return f"has no dropout, and model.attn_pdrop is {model.attn_pdrop}"
    if model.head_width < FLEX_NARROWEST:
        return f"needs heads of width {FLEX_NARROWEST} or more, not {model.head_width}"
    return None


def _flash_obstacle(
    model: Model, device: Device, flash_installed: bool, precision: Precision
) -> str | None:
    if device == "cpu":
        return "runs on GPUs alone"
    if not flash_installed:
        oldest = ".".join(map(str, FLASH_FROM))
        return f"needs the package flash-attn, version 2 from {oldest} on, which is not installed"
    if precision != "bf16":
        return f"computes in bf16, and the precision is {precision}"
    if model.head_width > FLASH_WIDEST:
        return f"takes heads up to a width of {FLASH_WIDEST}, not {model.head_width}"
    if model.attn_uses_sequence_id:
        return "does not keep documents apart, as model.attn_uses_sequence_id wants"
    if model.attn_pdrop > 0 and model.attn_logit_softcapping is not None:
        return "takes model.attn_pdrop or model.attn_logit_softcapping, not both"
    return None
