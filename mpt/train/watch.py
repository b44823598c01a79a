"""Between the loop and whoever looks at it: reads each step's result one step late, and reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpt import health
from mpt.display import Display, Reading
from mpt.launch.attempt import this_attempt
from mpt.ledger import Ledger, Skipped
from mpt.log import Journal
from mpt.recipe.train import Health
from mpt.rundir import EVENTS
from mpt.state import RunState, StepResult

SMOOTHING = 0.9
"""Weight of the past in the step time that the time left is computed from."""


class _Numbers:
    """What a step reports, on its way to the host.

    A tensor that is read waits for all that was queued on its device before, and that is the next
    step as well: the device would idle until the host has looked. So the numbers leave as soon as
    they are queued, and what is waited for is that they have arrived.
    """

    def __init__(self, result: StepResult) -> None:
        told = (result.loss, result.grad_norm, result.applied, result.bad_samples)
        numbers = torch.stack([number.double() for number in told])  # holds each of them exactly
        self._arrived: torch.cuda.Event | None = None
        self._host = numbers
        if numbers.is_cuda:
            self._host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[float, float, bool, int]:
        """Return loss, norm of the gradient, whether the update was applied, and bad samples."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, applied, bad_samples = self._host.tolist()
        return loss, grad_norm, bool(applied), int(bad_samples)


@dataclass(frozen=True)
class _Pending:
    """A step that has been queued on the device, and may not be finished there."""

    state: RunState
    """After the step."""
    before: int
    """`RunState.samples` before it."""
    numbers: _Numbers
    limit: float
    """Loss above which it counts as a spike."""
    lr: float
    step_s: float
    data_wait_s: float


class Watch:
    """Turns step results into records and lines. Every rank has one; rank 0's speaks.

    A result is read when the next step has been queued: by then it is there, or about to be, and
    the device has work while the host looks.
    """

    def __init__(
        self,
        journal: Journal,
        display: Display,
        *,
        first: bool,
        ledger: Ledger,
        write: Callable[[Skipped], None],
        cfg: Health,
        samples_per_step: int,
        tokens_per_step: int,
        flops_per_token: Callable[[int], float],
        peak_flops: float | None,
        steps: int,
        checkpoint: int | None,
    ) -> None:
        """Begin without a step.

        Args:
            first: whether this is rank 0.
            flops_per_token: of a step, counted from 1.
            write: adds a line to the ledger, or raises OSError.
        """
        self._journal = journal
        self._display = display
        self._first = first
        self._ledger = ledger
        self._write = write
        self._cfg = cfg
        self._samples_per_step = samples_per_step
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._steps = steps
        self._checkpoint = checkpoint
        self._pending: _Pending | None = None
        self._smooth_s: float | None = None
        self.why_skipped = ""
        """Why the last update that was left out was."""

    def queued(
        self,
        state: RunState,
        result: StepResult,
        *,
        before: int,
        limit: float,
        lr: float,
        began: float,
        data_wait_s: float,
    ) -> None:
        """Take in the step just queued; the one before must be settled.

        Args:
            before: `RunState.samples` before the step.
            limit: loss above which it counts as a spike.
            began: `time.perf_counter()` when the step began.
        """
        assert self._pending is None, "a result was not read"
        step_s = time.perf_counter() - began
        numbers = _Numbers(result)
        self._pending = _Pending(state, before, numbers, limit, lr, step_s, data_wait_s)

    def settle(self, state: RunState) -> RunState:
        """Report the step that is still out, waiting for the device if need be.

        What is skipped is in the ledger, on disk, when this returns: nothing that is saved after
        it knows of a skip that the ledger does not.

        Returns:
            `state`, its vitals and its count of bad samples now those after that step.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return state
        loss, grad_norm, applied, n_bad = pending.numbers.read()
        step, stop = pending.state.step, pending.state.samples
        start = stop - self._samples_per_step
        if self._first:
            self._record(pending, loss, grad_norm, applied)
        if not applied:
            self._skipped(Skipped(step, start, stop, self._why(pending, loss, grad_norm, start)))
        vitals = health.after(
            state.vitals,
            step=step,
            before=pending.before,
            start=start,
            stop=stop,
            loss=loss,
            applied=applied,
            window=self._cfg.spike_window,
        )
        if n_bad:
            text = f"step {step:,}: {n_bad} bad samples left out, see bad_sample in {EVENTS}"
            self._display.note(text, "yellow")
        return replace(state, vitals=vitals, bad_samples=state.bad_samples + n_bad)

    def evaluated(self, state: RunState, loss: float, bits_per_byte: float | None) -> None:
        """Report a held-out loss."""
        if not self._first:
            return
        fields: dict[str, Any] = {"attempt": this_attempt(), "step": state.step, "eval_loss": loss}
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

    def _why(self, pending: _Pending, loss: float, grad_norm: float, start: int) -> str:
        if self._ledger.skips(pending.state.step, start):
            return "the ledger says so"
        return health.why_skipped(loss, grad_norm, pending.limit, self._cfg)

    def _skipped(self, entry: Skipped) -> None:
        """Report an update that was left out on all ranks; once, whatever is taken again."""
        self.why_skipped = entry.why
        if not self._first:
            return
        self._display.note(f"step {entry.step:,}: skipped: {entry.why}", "yellow")
        if self._ledger.skips(entry.step, entry.start):
            return
        self._journal.event(
            "skipped",
            attempt=this_attempt(),
            step=entry.step,
            positions=[entry.start, entry.stop],
            why=entry.why,
        )
        try:
            self._write(entry)
        except OSError as error:  # a replay would differ, but this run can go on
            why = f"the ledger cannot be written: {error}"
            self._journal.event("warning", attempt=this_attempt(), why=why)
            self._display.note(why, "red")

    def _record(self, pending: _Pending, loss: float, grad_norm: float, applied: bool) -> None:
        state, step_s = pending.state, pending.step_s
        computed = not self._ledger.skips(state.step, state.samples - self._samples_per_step)
        per_second = self._tokens_per_step / step_s if computed else 0.0
        mfu = self._peak_flops and per_second * self._flops_per_token(state.step) / self._peak_flops
        self._journal.metrics(
            attempt=this_attempt(),
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
        if not computed:
            return
        past = step_s if self._smooth_s is None else self._smooth_s
        self._smooth_s = SMOOTHING * past + (1 - SMOOTHING) * step_s
        left_s = self._smooth_s * (self._steps - state.step)
        self._display.show(
            Reading(state.step, loss, pending.lr, per_second, mfu, left_s, self._checkpoint)
        )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
