"""The `model.rope_hf_config:` section: how rotations are stretched to longer contexts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mpt.recipe.problem import Problem


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Names and meanings are transformers' own."""

    type: Literal["no_scaling", "linear", "dynamic", "llama3"] = "no_scaling"
    """linear: positions are divided by factor; dynamic: the base grows once an input is longer
    than max_seq_len; llama3: slow rotations are divided by factor, fast ones left alone."""
    factor: float = 1.0
    """How much longer contexts become."""
    low_freq_factor: float = 1.0
    """llama3: rotations that make fewer turns than this in the original context are slow."""
    high_freq_factor: float = 4.0
    """llama3: rotations that make more turns than this in the original context are fast."""
    original_max_position_embeddings: int | None = None
    """llama3: the original context, in tokens."""

    def problems(self, rope: bool, max_seq_len: int) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if self == RopeScaling():
            return
        key = "model.rope_hf_config"
        if not rope:
            yield Problem(key, "has no meaning without rope.", "add `rope: true`, or drop it.")
        if not 1.0 <= self.factor < float("inf"):
            yield Problem(f"{key}.factor", f"{self.factor} is not 1 or more.")
        original = self.original_max_position_embeddings
        if self.type != "llama3":
            return
        if original is None or not 1 <= original <= max_seq_len * 1_000_000:
            yield Problem(
                f"{key}.original_max_position_embeddings",
                f"{original} is not a context; llama3 needs the one first trained on.",
            )
        if not 0.0 < self.low_freq_factor < self.high_freq_factor < float("inf"):
            yield Problem(
                f"{key}.high_freq_factor",
                f"{self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}.",
            )
