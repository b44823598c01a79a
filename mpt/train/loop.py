"""The training loop: named services in a written order, and one integer of progress."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mpt.checkpoint.save import Saver
from mpt.data.loader import Loader
from mpt.dist import Ranks, max_over_ranks
from mpt.launch.pulse import Phase, Pulse
from mpt.objective import next_token_nats
from mpt.optim import set_learning_rate
from mpt.recipe import Recipe
from mpt.schedule import learning_rate
from mpt.state import RunState
from mpt.train.step import train_step
from mpt.train.stop import StopSignal
from mpt.train.watch import Watch

Evaluate = Callable[[], tuple[float, float | None]]
"""-> held-out loss in nats per target token, and bits per byte where the data knows its bytes."""


@dataclass(frozen=True)
class Services:
    """What the loop calls, beside the model."""

    loader: Loader
    saver: Saver
    watch: Watch
    evaluate: Evaluate | None
    stop: StopSignal
    pulse: Pulse


def loop(
    cfg: Recipe,
    state: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    services: Services,
    ranks: Ranks,
) -> tuple[RunState, int | None]:
    """Train from `state` to the last step of the recipe, or until a signal asks to stop.

    Returns:
        Where it ended, saved, and the signal; None if the run is done.
    """
    loader, saver, watch, pulse = services.loader, services.saver, services.watch, services.pulse
    samples, steps = cfg.train.global_batch_size, cfg.train.steps
    if stopped_by := max_over_ranks(services.stop.number):
        return state, stopped_by  # before the first step there is nothing to save
    phase = Phase.FIRST_STEP
    while state.step < steps:
        pulse.beat(phase, state.step)
        phase = Phase.STEP
        began = time.perf_counter()
        microbatches = loader.next(state.step)
        data_wait_s = time.perf_counter() - began
        lr = learning_rate(cfg.schedule, cfg.optimizer.lr, state.step, steps)
        set_learning_rate(optimizer, lr)
        torch.manual_seed(dropout_seed(cfg.seed, state.step, ranks.rank))
        result = train_step(
            model,
            optimizer,
            microbatches,
            next_token_nats,
            max_grad_norm=cfg.train.max_grad_norm,
        )
        tokens = samples * cfg.model.max_seq_len
        state = RunState(state.step + 1, state.samples + samples, state.tokens + tokens)
        watch.step(state, result, lr=lr, began=began, data_wait_s=data_wait_s)

        last = state.step == steps
        if services.evaluate and (last or state.step % cfg.eval.every_steps == 0):
            # Before the save: a run that dies in between evaluates again, and never not at all.
            watch.settle()
            pulse.beat(Phase.EVALUATE, state.step)
            watch.evaluated(state, *services.evaluate())
        stopped_by = max_over_ranks(services.stop.number)
        if last or stopped_by or state.step % cfg.checkpoint.every_steps == 0:
            watch.settle()
            pulse.beat(Phase.SAVE, state.step)
            saver.save(state)
        if stopped_by and not last:
            return state, stopped_by
    pulse.beat(Phase.END, state.step)
    return state, None


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of one rank's dropout in one step: nothing about it need be saved."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
