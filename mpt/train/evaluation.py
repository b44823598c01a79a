"""Evaluations within a run: when one is due, whether it was recorded, and how it is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from mpt.data.dataset import open_dataset
from mpt.data.loader import eval_batches
from mpt.dist import Ranks, from_first
from mpt.evaluate import bits_per_byte, evaluate
from mpt.launch.pulse import Phase, Pulse
from mpt.objective import next_token_loss
from mpt.recipe import Recipe
from mpt.rundir import METRICS
from mpt.train.stop import StopSignal

HeldOut = tuple[float, float | None]
"""Held-out loss in nats per target token, and bits per byte where the data knows its bytes."""

Evaluate = Callable[[int], HeldOut | None]
"""Called with the steps finished; None if a signal to stop came first, on any rank."""


def evaluation(
    cfg: Recipe,
    ranks: Ranks,
    model: nn.Module,
    microbatch_size: int,
    eod_id: int | None,
    stop: StopSignal,
    pulse: Pulse,
) -> Evaluate | None:
    """Return the function that evaluates, or None where no data is held out."""
    if cfg.data.eval is None:
        return None
    dataset = open_dataset(cfg.data.eval.path, cfg.data.cache)

    def run(step: int) -> HeldOut | None:
        batches = eval_batches(
            dataset,
            cfg.model,
            microbatch_size=microbatch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            samples=cfg.eval.samples,
            device=ranks.device,
            eod_id=eod_id,
        )
        loss = evaluate(
            model,
            batches,
            next_token_loss,
            ranks.device,
            stop=lambda: stop.number != 0,
            beat=partial(pulse.beat, Phase.EVALUATE, step),
        )
        if loss is None:
            return None
        rate = dataset.tokens_per_byte
        return loss, None if rate is None else bits_per_byte(loss, rate)

    return run


def evaluation_due(cfg: Recipe, step: int) -> bool:
    """Return whether held-out loss is wanted after this step."""
    return step > 0 and (step == cfg.train.steps or step % cfg.eval.every_steps == 0)


def evaluation_owed(cfg: Recipe, run_dir: Path, step: int, ranks: Ranks) -> bool:
    """Return whether the evaluation after this step is due and was never recorded.

    So it is after a run was stopped within it: the step is saved, the evaluation is not.
    """
    if cfg.data.eval is None or not evaluation_due(cfg, step):
        return False
    return bool(from_first(ranks.is_first and not _recorded(run_dir / METRICS, step)))


def _recorded(metrics: Path, step: int) -> bool:
    """Return whether the last time that the step was taken, an evaluation came after it."""
    if not metrics.exists():
        return False
    found, marks = False, (f'"step": {step},'.encode(), b'"eval_loss"')
    with metrics.open("rb") as lines:
        for line in lines:
            if marks[0] not in line:  # sooner seen than parsed; there may be millions
                continue
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a crash
                continue
            if isinstance(record, dict) and record.get("step") == step:
                found = "eval_loss" in record
    return found
