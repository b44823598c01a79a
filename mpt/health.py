"""Verdicts on a run from what its steps report; pure, so that all ranks come to the same one."""

from __future__ import annotations

from dataclasses import dataclass

from mpt.errors import DivergedError

MAX_SKIPPED_IN_A_ROW = 20
"""A run that cannot take a step for this long will not by itself take one again."""


@dataclass(frozen=True)
class Health:
    """What must be remembered from step to step to judge the next one."""

    skipped_in_a_row: int = 0

    def after(self, step: int, *, applied: bool, loss: float, grad_norm: float) -> Health:
        """Return the health after one more step.

        Raises:
            DivergedError: if no step could be taken for `MAX_SKIPPED_IN_A_ROW` steps.
        """
        if applied:
            return Health()
        if self.skipped_in_a_row + 1 < MAX_SKIPPED_IN_A_ROW:
            return Health(self.skipped_in_a_row + 1)
        raise DivergedError(
            f"step {step}: loss {loss} and gradient norm {grad_norm} were not finite for "
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row. Resume from an earlier checkpoint with a "
            "lower optimizer.lr, more schedule.warmup_steps or a smaller train.max_grad_norm."
        )
