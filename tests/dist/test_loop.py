"""The loop asks for the right step, at the right learning rate, with the right seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mpt import recipe
from mpt.dist import Ranks
from mpt.evaluate import evaluate
from mpt.launch.pulse import Pulse
from mpt.model.network import MPT
from mpt.objective import next_token_nats
from mpt.optim import build_optimizer
from mpt.recipe.model import Model
from mpt.schedule import learning_rate
from mpt.state import IGNORE, Microbatch, RunState
from mpt.train.loop import Services, dropout_seed, loop
from mpt.train.stop import StopSignal
from tests.tiny_model import sharded, weights_of
from tests.world import on_ranks

RECIPE = Path(__file__).parents[1] / "golden" / "recipe.yaml"
DROPPING = Model(
    d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=97, emb_pdrop=0.2, attn_pdrop=0.1
)


class Recorder:
    """Stands where loader, saver and watch do, and remembers what the loop asks of them."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.rates: list[float] = []
        self.saved: list[RunState] = []
        self.seeds: list[int] = []

    def next(self, step: int) -> list[Microbatch]:
        self.asked.append(step)
        tokens = torch.full((2, 16), step % 97)
        return [Microbatch(tokens, tokens.roll(-1, dims=1))]

    def step(self, state: RunState, result: Any, *, lr: float, **_: float) -> None:
        self.rates.append(lr)
        self.seeds.append(torch.initial_seed())

    def settle(self) -> None: ...

    def evaluated(self, *_: Any) -> None: ...

    def save(self, state: RunState) -> None:
        self.saved.append(state)


def run_loop(ranks: Ranks, start: int, stop_on_rank: int | None) -> tuple[Recorder, RunState, Any]:
    cfg = recipe.load(
        RECIPE, ["train.steps=9", "schedule.warmup_steps=3", "checkpoint.every_steps=4"]
    )
    model = sharded(ranks)
    optimizer = build_optimizer(model, cfg.optimizer)
    stop = StopSignal()

    class StopAfterTwo(Recorder):
        def step(self, state: RunState, result: Any, *, lr: float, **rest: float) -> None:
            super().step(state, result, lr=lr, **rest)
            assert optimizer.param_groups[0]["lr"] == lr, "the rate is set, not only reported"
            if ranks.rank == stop_on_rank and len(self.rates) == 2:
                stop.number = 15

    seen = StopAfterTwo()
    services = Services(seen, seen, seen, None, stop, Pulse.create())  # type: ignore[arg-type]
    state, stopped_by = loop(
        cfg, RunState(start, start * 32, 0), model, optimizer, services, ranks
    )
    plain = Recorder()
    plain.__dict__.update(seen.__dict__)
    return plain, state, stopped_by


@pytest.mark.parametrize("start", [0, 5])
def test_each_step_has_its_samples_its_rate_and_its_seed(start: int) -> None:
    cfg = recipe.load(RECIPE)
    ((seen, state, stopped_by),) = on_ranks(1, run_loop, start, None)
    steps = list(range(start, 9))
    assert seen.asked == steps
    schedule = recipe.load(RECIPE, ["schedule.warmup_steps=3", "train.steps=9"]).schedule
    assert seen.rates == [learning_rate(schedule, cfg.optimizer.lr, step, 9) for step in steps]
    assert seen.seeds == [dropout_seed(cfg.seed, step, 0) for step in steps]
    assert [saved.step for saved in seen.saved] == [s for s in (4, 8, 9) if s > start]
    assert (state.step, state.samples, stopped_by) == (9, 9 * 32, None)


def test_a_signal_on_one_rank_stops_all_of_them_after_the_same_saved_step() -> None:
    for seen, state, stopped_by in on_ranks(2, run_loop, 0, 1):
        assert stopped_by == 15
        assert state.step == 2
        assert [saved.step for saved in seen.saved] == [2]


def test_seeds_of_dropout_differ_between_steps_and_ranks() -> None:
    seeds = {dropout_seed(17, step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400


def batches(ranks: Ranks) -> list[Microbatch]:
    """Six samples, shared out; a rank with fewer gets padding that takes no loss."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (6, 16), generator=generator)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    targets[2, 3:] = IGNORE
    mine = range(ranks.rank, 6, ranks.world_size)
    found = [Microbatch(tokens[i : i + 1], targets[i : i + 1]) for i in mine]
    empty = Microbatch(tokens[:1], torch.full_like(targets[:1], IGNORE))
    return found + [empty] * (-(-6 // ranks.world_size) - len(found))


def held_out(ranks: Ranks) -> tuple[float, float, bool]:
    model = sharded(ranks, DROPPING)
    loss = evaluate(model, batches(ranks), next_token_nats, ranks.device)
    plain = MPT(DROPPING).eval()
    plain.load_state_dict(weights_of(model))
    alone = Ranks(0, 0, 1, ranks.device, ranks.mesh, ranks.host_mesh)
    nats, count = 0.0, 0
    with torch.no_grad():
        for batch in batches(alone):
            flat = batch.targets.flatten()
            logits = plain(batch.tokens).flatten(0, 1)
            nats += float(F.cross_entropy(logits, flat, ignore_index=IGNORE, reduction="sum"))
            count += int((flat != IGNORE).sum())
    return loss, nats / count, model.training


@pytest.mark.parametrize("world_size", [1, 3])
def test_held_out_loss_is_the_mean_over_all_targets_without_dropout(world_size: int) -> None:
    for ours, plain, training_again in on_ranks(world_size, held_out):
        assert ours == pytest.approx(plain, rel=1e-5)
        assert math.isfinite(ours)
        assert training_again
