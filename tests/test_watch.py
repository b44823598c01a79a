"""What is said of a step: what was skipped and why, and trouble that must not stop the run."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpt.display import Display
from mpt.ledger import Ledger, Skipped
from mpt.log import Journal, read_lines
from mpt.recipe.train import Health
from mpt.rundir import EVENTS, METRICS
from mpt.state import RunState, StepResult, Streak
from mpt.train.step import left_out
from mpt.train.watch import Watch

STEPS = 9


def watch_in(
    run_dir: Path, write: Callable[[Skipped], None], ledger: Ledger | None = None
) -> tuple[Watch, io.StringIO]:
    terminal = io.StringIO()
    watch = Watch(
        Journal(run_dir),
        Display(terminal, STEPS, 1),
        first=True,
        ledger=ledger or Ledger(),
        write=write,
        cfg=Health(),
        samples_per_step=6,
        tokens_per_step=60,
        flops_per_token=lambda step: 1.0,
        peak_flops=1.0,
        steps=STEPS,
        checkpoint=None,
    )
    return watch, terminal


def settled(watch: Watch, result: StepResult) -> RunState:
    """Return the state after step 3, which began at position 12."""
    state = RunState(3, 18, 180)
    began = time.perf_counter()
    watch.queued(state, result, before=12, limit=5.0, lr=0.1, began=began, data_wait_s=0.0)
    return watch.settle(state)


def result(loss: float, applied: bool) -> StepResult:
    return StepResult(torch.tensor(loss), torch.tensor(1.0), torch.tensor(applied), torch.tensor(0))


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return list(read_lines(run_dir / name))


def test_a_skipped_step_is_told_with_its_data_and_is_in_the_ledger_when_it_is_settled(
    tmp_path: Path,
) -> None:
    written: list[Skipped] = []
    watch, terminal = watch_in(tmp_path, written.append)
    state = settled(watch, result(9.25, applied=False))
    assert state.vitals.streak == Streak(1, 2, 12, 12, 18)
    why = "loss 9.2500 is above 5.0000, the mean of 128 steps + 6 sigma"
    assert written == [Skipped(3, 12, 18, why)]
    (event,) = records(tmp_path, EVENTS)
    told = {key: event[key] for key in ("event", "attempt", "step", "positions", "why")}
    assert told == {
        "event": "skipped",
        "attempt": 0,
        "step": 3,
        "positions": [12, 18],
        "why": why,
    }
    assert f"step 3: skipped: {why}" in terminal.getvalue()
    assert watch.settle(state) == state, "nothing is out any more"
    assert len(written) == 1


def test_a_ledger_that_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path) -> None:
    def full(_: Skipped) -> None:
        raise OSError(28, "No space left on device")

    watch, terminal = watch_in(tmp_path, full)
    state = settled(watch, result(math.nan, applied=False))
    assert state.vitals.streak.n == 1
    _, event = records(tmp_path, EVENTS)
    assert event["event"] == "warning"
    assert "the ledger cannot be written: [Errno 28] No space left" in event["why"]
    assert "the ledger cannot be written" in terminal.getvalue()


def test_a_step_that_the_ledger_leaves_out_has_a_line_but_no_speed(tmp_path: Path) -> None:
    written: list[Skipped] = []
    watch, _ = watch_in(tmp_path, written.append, Ledger((Skipped(3, 12, 18, "nan"),)))
    settled(watch, left_out())
    assert written == []
    (line,) = records(tmp_path, METRICS)
    assert (line["step"], line["samples"], line["applied"]) == (3, 18, False)
    assert (line["loss"], line["tokens_per_second"], line["mfu"]) == (None, 0.0, 0.0)


def test_bad_samples_are_counted_and_told(tmp_path: Path) -> None:
    watch, terminal = watch_in(tmp_path, lambda entry: None)
    for known, count in ((0, 0), (0, 2), (2, 1)):
        found = replace(result(1.0, applied=True), bad_samples=torch.tensor(count))
        watch.queued(
            RunState(3, 18, 180),
            found,
            before=12,
            limit=5.0,
            lr=0.1,
            began=0.0,
            data_wait_s=0.0,
        )
        assert watch.settle(RunState(3, 18, 180, bad_samples=known)).bad_samples == known + count
    told = [line for line in terminal.getvalue().splitlines() if "bad samples" in line]
    assert len(told) == 2
    assert "step 3: 2 bad samples left out" in told[0]


def test_what_is_reported_left_the_device_when_the_step_was_queued(tmp_path: Path) -> None:
    watch, _ = watch_in(tmp_path, lambda _: None)
    taken, state = result(2.5, applied=True), RunState(3, 18, 180)
    watch.queued(
        state, taken, before=12, limit=5.0, lr=0.1, began=time.perf_counter(), data_wait_s=0.0
    )
    for number in (taken.loss, taken.grad_norm, taken.applied):
        number.zero_()  # as the next step may do with memory that is free again
    assert watch.settle(state).vitals.losses == ((3, 2.5),)
    assert [line["grad_norm"] for line in records(tmp_path, METRICS)] == [1.0]
