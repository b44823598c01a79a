"""The `model.init_config:` section: how weights begin, in MPT's own spelling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mpt.recipe.problem import Problem

Scheme = Literal[
    "default_",
    "baseline_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "neox_init_",
    "small_init_",
    "xavier_uniform_",
    "xavier_normal_",
]
Nonlinearity = Literal["linear", "relu", "leaky_relu", "sigmoid", "tanh", "selu"]

_KAIMING = ("kaiming_uniform_", "kaiming_normal_")
_XAVIER = ("xavier_uniform_", "xavier_normal_")
_DRAWN = tuple(scheme for scheme in get_args(Scheme) if scheme != "default_")
_NEEDS = {
    "init_std": ("baseline_",),
    "init_gain": (*_KAIMING, *_XAVIER),
    "fan_mode": _KAIMING,
    "init_nonlinearity": _KAIMING,
    "init_div_is_residual": tuple(scheme for scheme in _DRAWN if scheme != "neox_init_"),
    "emb_init_std": _DRAWN,
    "emb_init_uniform_lim": _DRAWN,
}
"""Knobs that only some schemes have."""


@dataclass(frozen=True, kw_only=True)
class Init:
    name: Scheme = "kaiming_normal_"
    """One of MPT's eight; the table is in mpt/model/init.py."""
    init_std: float | None = None
    """baseline_: standard deviation of every weight."""
    init_gain: float = 0.0
    """xavier: the gain; kaiming: the negative slope that leaky_relu is thought to have."""
    fan_mode: Literal["fan_in", "fan_out"] = "fan_in"
    """kaiming: keep the variance of outputs (fan_in), or of gradients (fan_out)."""
    init_nonlinearity: Nonlinearity = "relu"
    """kaiming: what is thought to follow each matrix."""
    init_div_is_residual: bool | float = True
    """Matrices that add to the residual stream are divided by this; true: sqrt(2 n_layers), and
    with neox_init_ always n_layers / sqrt(10)."""
    emb_init_std: float | None = None
    """Standard deviation of embeddings, in place of the scheme's."""
    emb_init_uniform_lim: float | tuple[float, float] | None = None
    """Embeddings are uniform in [-lim, lim], or between two limits."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        key = "model.init_config"
        for knob, schemes in _NEEDS.items():
            if self.name not in schemes and getattr(self, knob) != getattr(Init, knob):
                yield Problem(
                    f"{key}.{knob}",
                    f"has no meaning for {self.name}, only for {', '.join(schemes)}.",
                )
        if self.name == "baseline_" and self.init_std is None:
            yield Problem(f"{key}.init_std", "missing; baseline_ needs it.", "try 0.02.")
        if self.name in _XAVIER and self.init_gain == 0.0:
            yield Problem(
                f"{key}.init_gain", f"0.0 would make all weights zero with {self.name}.", "try 1.0."
            )
        for knob in ("init_std", "init_gain", "emb_init_std"):
            value = getattr(self, knob)
            if value is not None and not 0.0 <= value < math.inf:
                yield Problem(f"{key}.{knob}", f"{value} is negative or infinite.")
        divisor = self.init_div_is_residual
        if not isinstance(divisor, bool) and not 0.0 < divisor < math.inf:
            yield Problem(f"{key}.init_div_is_residual", f"{divisor} is not a positive number.")
        if self.emb_init_std is not None and self.emb_init_uniform_lim is not None:
            yield Problem(f"{key}.emb_init_uniform_lim", "emb_init_std is given as well.")
        yield from self._bad_limits(key)

    def _bad_limits(self, key: str) -> Iterator[Problem]:
        lim = self.emb_init_uniform_lim
        if lim is None:
            return
        low, high = lim if isinstance(lim, tuple) else (-lim, lim)
        if not -math.inf < low < high < math.inf:
            yield Problem(f"{key}.emb_init_uniform_lim", f"[{low}, {high}] is no interval.")
