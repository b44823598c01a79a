"""Between the loop and whoever looks at it: reads each step's result one step late, and reports."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from mpt.display import Display, Reading
from mpt.health import Health
from mpt.log import Journal
from mpt.state import RunState, StepResult

SMOOTHING = 0.9
"""Weight of the past in the step time that the time left is computed from."""


@dataclass(frozen=True)
class _Pending:
    """A step that has been queued on the device, and may not be finished there."""

    state: RunState
    result: StepResult
    lr: float
    step_s: float
    data_wait_s: float


class Watch:
    """Turns step results into records, lines and verdicts. Every rank has one; rank 0's speaks.

    A result is read when the next step has been queued: by then it is there, so the device
    never idles while the host looks.
    """

    def __init__(
        self,
        journal: Journal,
        display: Display,
        *,
        first: bool,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        steps: int,
        checkpoint: int | None,
    ) -> None:
        self._journal = journal
        self._display = display
        self._first = first
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._steps = steps
        self._checkpoint = checkpoint
        self._pending: _Pending | None = None
        self._smooth_s: float | None = None
        self._health = Health()

    def step(
        self, state: RunState, result: StepResult, *, lr: float, began: float, data_wait_s: float
    ) -> None:
        """Take in the step just queued, and report the one before.

        Args:
            began: `time.perf_counter()` when the step began.

        Raises:
            DivergedError: on every rank alike.
        """
        self.settle()
        step_s = time.perf_counter() - began
        self._pending = _Pending(state, result, lr, step_s, data_wait_s)

    def settle(self) -> None:
        """Report the step that is still out, waiting for the device if need be."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        loss, grad_norm = float(pending.result.loss), float(pending.result.grad_norm)
        applied = bool(pending.result.applied)
        if self._first:
            self._record(pending, loss, grad_norm, applied)
        self._health = self._health.after(
            pending.state.step, applied=applied, loss=loss, grad_norm=grad_norm
        )

    def evaluated(self, state: RunState, loss: float, bits_per_byte: float | None) -> None:
        """Report a held-out loss."""
        if not self._first:
            return
        fields: dict[str, Any] = {"step": state.step, "eval_loss": loss}
        text = f"step {state.step:,}: held-out loss {loss:.4f} nats/token"
        if bits_per_byte is not None:
            fields["eval_bits_per_byte"] = bits_per_byte
            text += f", {bits_per_byte:.4f} bits/byte"
        self._journal.metrics(**fields)
        self._display.note(text, "cyan")

    def report_save(self, kind: str, **fields: Any) -> None:
        """Report what became of a save; called from the thread that wrote it."""
        if not self._first:
            return
        self._journal.event(kind, **fields)
        if kind == "checkpoint":
            self._checkpoint = int(fields["step"])
        else:
            last = "none yet" if self._checkpoint is None else f"step {self._checkpoint:,}"
            self._display.note(f"{fields['why']} (last good checkpoint: {last})", "red")

    def _record(self, pending: _Pending, loss: float, grad_norm: float, applied: bool) -> None:
        state, step_s = pending.state, pending.step_s
        per_second = self._tokens_per_step / step_s
        mfu = self._peak_flops and per_second * self._flops_per_token / self._peak_flops
        self._journal.metrics(
            step=state.step,
            tokens=state.tokens,
            samples=state.samples,
            loss=_finite(loss),
            lr=pending.lr,
            grad_norm=_finite(grad_norm),
            tokens_per_second=round(per_second, 1),
            mfu=mfu and round(mfu, 5),
            step_s=round(step_s, 5),
            data_wait_s=round(pending.data_wait_s, 5),
            applied=applied,
        )
        if not applied:
            why = f"loss {loss}, gradient norm {grad_norm}: the update was skipped on all ranks"
            self._journal.event("skipped", step=state.step, why=why)
            self._display.note(f"step {state.step:,}: {why}", "yellow")
        past = step_s if self._smooth_s is None else self._smooth_s
        self._smooth_s = SMOOTHING * past + (1 - SMOOTHING) * step_s
        left_s = self._smooth_s * (self._steps - state.step)
        self._display.show(
            Reading(state.step, loss, pending.lr, per_second, mfu, left_s, self._checkpoint)
        )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
