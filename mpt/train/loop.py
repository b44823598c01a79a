"""The training loop: named services in a written order, and one integer of progress."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import nn

from mpt.checkpoint.memory import Memory
from mpt.checkpoint.save import Saver
from mpt.data.loader import Loader
from mpt.dist import Ranks, max_over_ranks
from mpt.health import before_streak, loss_limit, must_roll_back
from mpt.launch.pulse import Phase, Pulse
from mpt.ledger import Ledger
from mpt.objective import Objective, next_token_loss
from mpt.optim import set_learning_rate
from mpt.recipe import Recipe
from mpt.schedule import learning_rate
from mpt.state import RunState, Streak
from mpt.train.bad_samples import BadSamples
from mpt.train.evaluation import Evaluate, evaluation_due
from mpt.train.inject import Injector
from mpt.train.pace import Pace
from mpt.train.step import left_out, train_step
from mpt.train.stop import StopSignal
from mpt.train.watch import Watch


@dataclass(frozen=True)
class Services:
    """What the loop calls, beside the model."""

    loader: Loader
    reduce_each: bool
    """As `train_step` has it."""
    ledger: Ledger
    watch: Watch
    roll_back: Callable[[Streak, str], NoReturn]
    """Given the updates that were skipped in a row, and why the last of them was."""
    evaluate: Evaluate | None
    evaluation_owed: bool
    """Whether the step that the run begins at still lacks its evaluation."""
    bad_samples: BadSamples
    memory: Memory
    saver: Saver
    stop: StopSignal
    pulse: Pulse
    pace: Pace
    injector: Injector | None


def loop(
    cfg: Recipe,
    state: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    services: Services,
    ranks: Ranks,
) -> tuple[RunState, int | None]:
    """Train from `state` to the last step of the recipe, or until a signal asks to stop.

    After a step come, in this order and each if due: evaluation, copy to memory, save, stop.
    Whatever is due, the step's own result is read before it.

    Returns:
        Where it ended, saved, and the signal; None if the run is done.

    Raises:
        RollbackError, DivergedError: on every rank alike, after too many bad steps in a row.
        DataError: a sample that cannot be read; on every rank alike, too many that were skipped.
    """
    if services.evaluation_owed:
        _evaluate(state, services)
    if stopped_by := max_over_ranks(services.stop.number):
        if state.step > 0:  # it may have been restored from memory alone
            services.pulse.beat(Phase.SAVE, state.step)
            services.saver.save(state)
        return state, stopped_by
    phase = Phase.FIRST_STEP
    while state.step < cfg.train.steps:
        if _length(cfg, state.step) != _length(cfg, state.step - 1):
            phase = Phase.FIRST_STEP  # of its kind, so it may have to be compiled
        services.pulse.beat(phase, state.step)
        position = services.ledger.position(state.samples)
        if services.ledger.skips(state.step + 1, position):
            state = _leave_out_step(cfg, state, position, services)
        else:
            state = _take_step(cfg, state, position, model, optimizer, services, ranks)
            phase = Phase.STEP

        last = state.step == cfg.train.steps
        evaluated = True
        if services.evaluate and evaluation_due(cfg, state.step):
            # Before the save: a run that dies in between evaluates again, and never not at all.
            state = _judge(cfg, state, services)
            evaluated = _evaluate(state, services)
        if services.memory.due(state.step):
            state = _judge(cfg, state, services)
            services.memory.take(_of_weights(cfg, state))
        stopped_by = max_over_ranks(services.stop.number)
        if last or stopped_by or state.step % cfg.checkpoint.every_steps == 0:
            state = _judge(cfg, state, services)
            services.pulse.beat(Phase.SAVE, state.step)
            services.saver.save(state if last else _of_weights(cfg, state))
        if stopped_by and not (last and evaluated):
            return state, stopped_by
    services.pulse.beat(Phase.END, state.step)
    return state, None


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of one rank's dropout in one step: nothing about it need be saved."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _take_step(
    cfg: Recipe,
    state: RunState,
    position: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    services: Services,
    ranks: Ranks,
) -> RunState:
    """Queue a step on the data at `position`, and return the state after it."""
    services.pace.begin()
    began = time.perf_counter()
    if services.injector:
        services.injector.begin(state.step + 1)
    asked = time.perf_counter()
    microbatches = services.loader.next(position)
    data_wait_s = time.perf_counter() - asked
    services.bad_samples.report(state.step + 1, microbatches)
    length = _length(cfg, state.step)
    if length < cfg.model.max_seq_len:
        microbatches = [whole.cut(length) for whole in microbatches]
    lr = learning_rate(cfg.schedule, cfg.optimizer.lr, state.step, cfg.train.steps)
    set_learning_rate(optimizer, lr)
    torch.manual_seed(dropout_seed(cfg.seed, state.step, ranks.rank))
    objective: Objective = next_token_loss
    if services.injector:
        objective = services.injector.spoil(objective, state.step + 1)
    limit = loss_limit(state.vitals, state.step + 1, cfg.health)
    result = train_step(
        model,
        optimizer,
        microbatches,
        objective,
        max_grad_norm=cfg.train.max_grad_norm,
        reduce_each=services.reduce_each,
        loss_limit=limit,
        waiting=services.pace.waiting,
    )
    before = _judge(cfg, state, services)
    state = _after_step(cfg, before, position)
    services.watch.queued(
        state,
        result,
        before=before.samples,
        limit=limit,
        lr=lr,
        began=began,
        data_wait_s=data_wait_s,
    )
    services.pace.end(state.step)
    return state


def _leave_out_step(cfg: Recipe, state: RunState, position: int, services: Services) -> RunState:
    """Return the state after a step whose update the ledger leaves out: nothing is computed."""
    began = time.perf_counter()
    before = _judge(cfg, state, services)
    state = _after_step(cfg, before, position)
    services.watch.queued(
        state,
        left_out(),
        before=before.samples,
        limit=math.inf,
        lr=0.0,
        began=began,
        data_wait_s=0.0,
    )
    return state


def _length(cfg: Recipe, step: int) -> int:
    """Return the tokens of a sample as it is read in a step, the first being 0."""
    return cfg.train.sequence_length(max(step, 0), cfg.model.max_seq_len)


def _after_step(cfg: Recipe, state: RunState, position: int) -> RunState:
    samples = position + cfg.train.global_batch_size
    tokens = state.tokens + _tokens(cfg)
    return replace(state, step=state.step + 1, samples=samples, tokens=tokens)


def _of_weights(cfg: Recipe, state: RunState) -> RunState:
    """Return the state to save. If a rollback comes, it is one from before the bad steps."""
    return before_streak(state, _tokens(cfg))


def _tokens(cfg: Recipe) -> int:
    """Return the tokens read in a step."""
    return cfg.train.global_batch_size * cfg.model.max_seq_len


def _judge(cfg: Recipe, state: RunState, services: Services) -> RunState:
    """Return the state with the result that was still out, or go back if it was too many."""
    state = services.watch.settle(state)
    if must_roll_back(state.vitals, cfg.health):
        services.pulse.beat(Phase.SAVE, state.step)  # one may still be written, and takes long
        services.saver.wait()
        services.memory.forget()
        services.roll_back(state.vitals.streak, services.watch.why_skipped)
    services.bad_samples.check(state)
    return state


def _evaluate(state: RunState, services: Services) -> bool:
    """Evaluate and report; return False if a signal to stop came first."""
    assert services.evaluate is not None, "an evaluation is due only where data is held out"
    services.pulse.beat(Phase.EVALUATE, state.step)
    held_out = services.evaluate(state.step)
    if held_out is not None:
        services.watch.evaluated(state, *held_out)
    return held_out is not None
