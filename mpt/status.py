"""How a run is doing, from its files alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.checkpoint.layout import committed, step_of
from mpt.errors import UsageError
from mpt.launch.lease import holder
from mpt.log import read_lines
from mpt.recipe import load
from mpt.rundir import CHECKPOINTS, EVENTS, METRICS, RECIPE

LAST_EVENTS = 5


@dataclass(frozen=True, kw_only=True)
class Status:
    """What `mpt status` shows."""

    run: str
    state: str
    """running, finished, or stopped."""
    held_by: str | None
    """pid@host of the launch that trains it now."""
    step: int
    steps: int
    tokens: int
    loss: float | None
    """nats per target token, of the last step."""
    tokens_per_second: float | None
    mfu: float | None
    eval_loss: float | None
    eval_bits_per_byte: float | None
    checkpoints: tuple[int, ...]
    """Steps of the committed ones, newest first."""
    faults: int
    """Over all attempts."""
    last_events: tuple[dict[str, Any], ...]


def read_status(run_dir: Path) -> Status:
    """Return how a run is doing.

    Raises:
        UsageError: if it is not a run directory.
    """
    if not (run_dir / RECIPE).is_file():
        raise UsageError(f"{run_dir}: is not a run directory: it has no {RECIPE}.")
    cfg = load(run_dir / RECIPE)
    last_step: dict[str, Any] = {}
    last_eval: dict[str, Any] = {}
    for record in read_lines(run_dir / METRICS):
        if "loss" in record:
            last_step = record
        elif "eval_loss" in record:
            last_eval = record
    n_faults, finished, events = 0, False, deque[dict[str, Any]](maxlen=LAST_EVENTS)
    for event in read_lines(run_dir / EVENTS):
        n_faults += event.get("event") == "fault"
        finished = event.get("event") == "finished"
        events.append(event)
    held_by = holder(run_dir)
    step = int(last_step.get("step", 0))
    return Status(
        run=cfg.run,
        state="running" if held_by else "finished" if finished else "stopped",
        held_by=held_by,
        step=step,
        steps=cfg.train.steps,
        tokens=int(last_step.get("tokens", 0)),
        loss=last_step.get("loss"),
        tokens_per_second=last_step.get("tokens_per_second"),
        mfu=last_step.get("mfu"),
        eval_loss=last_eval.get("eval_loss"),
        eval_bits_per_byte=last_eval.get("eval_bits_per_byte"),
        checkpoints=tuple(step_of(path) for path in committed(run_dir / CHECKPOINTS)),
        faults=n_faults,
        last_events=tuple(events),
    )
