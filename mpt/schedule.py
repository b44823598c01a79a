"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mpt.recipe.train import Schedule


def learning_rate(cfg: Schedule, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, in a run of `steps`.

    Warm-up rises linearly and reaches `peak` at step `warmup_steps`; the last step of the run
    has `final * peak`, whatever the curve in between.
    """
    if step < cfg.warmup_steps:
        return peak * (step + 1) / (cfg.warmup_steps + 1)
    start = cfg.warmup_steps
    match cfg.name:
        case "constant":
            return peak
        case "cosine":
            fall = (1 - math.cos(math.pi * _progress(step, start, steps))) / 2
        case "linear":
            fall = _progress(step, start, steps)
        case "wsd":
            decay_steps = max(1, steps // 5) if cfg.decay_steps is None else cfg.decay_steps
            fall = _progress(step, max(start, steps - decay_steps - 1), steps)
    return peak * (1 - (1 - cfg.final) * fall)


def _progress(step: int, start: int, steps: int) -> float:
    """How far from `start` to the last step, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
