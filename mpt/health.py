"""Verdicts on a run from what its steps report; pure, so that all ranks come to the same one."""

from __future__ import annotations

import math
from dataclasses import replace

from mpt.recipe.train import Health
from mpt.state import RunState, Streak, Vitals

DEVIATION_FLOOR = 1e-3
"""nats per target token. A loss that hardly varies, as of one text over and over, would trip on
the rounding of its sums; and a jump of a few thousandths of a nat harms no run."""

READ_LATE = 2
"""The limit of a step knows the results up to this many steps before it: results are read one
step late. A save reads the last one early, and the limit must not depend on whether there was
one: a resumed run would decide otherwise than one that was never stopped."""


def loss_limit(vitals: Vitals, step: int, cfg: Health) -> float:
    """Return the loss, in nats per target token, above which `step` counts as a spike.

    It is the mean of the window and so many standard deviations; infinite until the window is
    full.
    """
    mean, deviation = _window(vitals, step, cfg.spike_window)
    return mean + cfg.spike_sigmas * deviation


def after(
    vitals: Vitals,
    *,
    step: int,
    before: int,
    start: int,
    stop: int,
    loss: float,
    applied: bool,
    window: int,
) -> Vitals:
    """Return the vitals after one more step.

    Args:
        before: `RunState.samples` before the step; data may have been passed over since.
        start: position in the data where the step began; `stop`: where it ended.
        loss: nats per target token. That of a skipped step is forgotten: one that is not finite
            would leave no mean, and a spike would raise the limit for those that come after.
        window: `health.spike_window`.
    """
    if applied:
        # One more than the window: the next limit leaves out the newest.
        kept = (*vitals.losses, (step, loss))[-(window + READ_LATE - 1) :]
        return Vitals(kept)
    streak = vitals.streak
    if streak.n == 0:
        return replace(vitals, streak=Streak(1, step - 1, before, start, stop))
    return replace(vitals, streak=replace(streak, n=streak.n + 1, stop=stop))


def before_streak(state: RunState, tokens_per_step: int) -> RunState:
    """Return the state that the weights are of: skipped updates have not changed them.

    To save this one loses nothing, since what the ledger leaves out is not computed again. And no
    checkpoint is ever in the way of a rollback, or takes the place of the one to go back to.
    """
    streak = state.vitals.streak
    if streak.n == 0:
        return state
    tokens = state.tokens - streak.n * tokens_per_step
    # Bad samples stay counted: what the ledger leaves out is not read again.
    return replace(
        state,
        step=streak.after_step,
        samples=streak.after_samples,
        tokens=tokens,
        vitals=Vitals(state.vitals.losses),
    )


def must_roll_back(vitals: Vitals, cfg: Health) -> bool:
    """Return whether so many updates in a row were skipped that the run must go back."""
    return vitals.streak.n >= cfg.max_skipped_in_a_row


def why_skipped(loss: float, grad_norm: float, limit: float, cfg: Health) -> str:
    """Return the reason for which an update was left out."""
    if not math.isfinite(loss + grad_norm):
        return f"loss {loss} or gradient norm {grad_norm} is not finite"
    return (
        f"loss {loss:.4f} is above {limit:.4f}, the mean of {cfg.spike_window} steps "
        f"+ {cfg.spike_sigmas:g} sigma"
    )


def _window(vitals: Vitals, step: int, size: int) -> tuple[float, float]:
    """Return mean and population standard deviation of the losses that `step` is judged by."""
    known = [loss for at, loss in vitals.losses if at <= step - READ_LATE][-size:]
    if len(known) < size:
        return math.inf, DEVIATION_FLOOR
    # fsum rounds once, so the order of summation has no part in it.
    mean = math.fsum(known) / size
    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in known) / size)
    return mean, max(deviation, DEVIATION_FLOOR)
