"""How a run is doing, from its files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.checkpoint.layout import committed, step_of
from mpt.errors import UsageError
from mpt.launch.lease import holder
from mpt.ledger import Ledger, read_ledger
from mpt.lineage import Account, Record, account, breaches, lineage, positions
from mpt.log import read_lines
from mpt.recipe import load
from mpt.rundir import CHECKPOINTS, EVENTS, LEDGER, METRICS, RECIPE

LAST_EVENTS = 5
MOST_BREACHES = 10
MILESTONES = {"attempt_started", "fault", "stopped", "finished", "gave_up"}


@dataclass(frozen=True, kw_only=True)
class Status:
    """What `mpt status` shows."""

    run: str
    state: str
    """running, finished, or stopped."""
    held_by: str | None
    """pid@host of the launch that trains it now."""
    nodes: tuple[str, ...]
    """Names of those of the latest attempt."""
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
    account: Account
    """What they cost."""
    chosen: dict[str, Any]
    """What every `auto` came to in the latest attempt, and by what."""
    breaches: tuple[str, ...]
    """The first places where the samples of the run are not one pass over the data."""
    last_events: tuple[dict[str, Any], ...]


def read_status(run_dir: Path) -> Status:
    """Return how a run is doing.

    Raises:
        UsageError: if it is not a run directory.
    """
    if not (run_dir / RECIPE).is_file():
        raise UsageError(f"{run_dir}: is not a run directory: it has no {RECIPE}.")
    cfg = load(run_dir / RECIPE)
    metrics = list(read_lines(run_dir / METRICS))
    events = list(read_lines(run_dir / EVENTS))
    steps = lineage(metrics, events)
    last_step = steps[-1] if steps else {}
    last_eval: Record = next((line for line in reversed(metrics) if "eval_loss" in line), {})
    ledger = Ledger.read(read_ledger(run_dir), run_dir / LEDGER, cfg.train.global_batch_size)
    held_by = holder(run_dir)
    milestones = (e.get("event") for e in reversed(events) if e.get("event") in MILESTONES)
    finished = next(milestones, None) == "finished"
    costs = account(metrics, events)
    chosen: Record = next((e for e in reversed(events) if e.get("event") == "chosen"), {})
    return Status(
        chosen={k: v for k, v in chosen.items() if k not in ("event", "time", "attempt")},
        run=cfg.run,
        state="running" if held_by else "finished" if finished else "stopped",
        held_by=held_by,
        nodes=_nodes(events),
        step=int(last_step.get("step", 0)),
        steps=cfg.train.steps,
        tokens=int(last_step.get("tokens", 0)),
        loss=last_step.get("loss"),
        tokens_per_second=last_step.get("tokens_per_second"),
        mfu=last_step.get("mfu"),
        eval_loss=last_eval.get("eval_loss"),
        eval_bits_per_byte=last_eval.get("eval_bits_per_byte"),
        checkpoints=tuple(step_of(path) for path in committed(run_dir / CHECKPOINTS)),
        faults=sum(costs.faults.values()),
        account=costs,
        breaches=_breaches(steps, ledger, cfg.train.global_batch_size),
        last_events=tuple(events[-LAST_EVENTS:]),
    )


def _nodes(events: list[dict[str, Any]]) -> tuple[str, ...]:
    starts = (event for event in reversed(events) if event.get("event") == "attempt_started")
    nodes = next((event.get("nodes") for event in starts), None)
    return tuple(map(str, nodes)) if isinstance(nodes, list) else ()


def _breaches(steps: list[Record], ledger: Ledger, global_batch_size: int) -> tuple[str, ...]:
    return tuple(breaches(positions(steps, global_batch_size), ledger)[:MOST_BREACHES])
