"""The loop asks for the right step, at the right learning rate, with the right seed."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mpt import recipe
from mpt.display import Display
from mpt.dist import Ranks
from mpt.evaluate import evaluate
from mpt.launch.pulse import Pulse
from mpt.ledger import Ledger, RolledBack, Skipped
from mpt.log import Journal
from mpt.model.network import MPT
from mpt.objective import next_token_loss
from mpt.optim import build_optimizer
from mpt.recipe.model import Model
from mpt.schedule import learning_rate
from mpt.state import IGNORE, Microbatch, RunState
from mpt.train.bad_samples import BadSamples
from mpt.train.evaluation import evaluation_owed
from mpt.train.loop import Services, dropout_seed, loop
from mpt.train.pace import Pace
from mpt.train.stop import StopSignal
from tests.tiny_model import sharded, weights_of
from tests.world import on_ranks

RECIPE = Path(__file__).parents[1] / "golden" / "recipe.yaml"
DROPPING = Model(
    d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=97, emb_pdrop=0.2, attn_pdrop=0.1
)


class Recorder:
    """Stands where the services do, and remembers what the loop asks of them, in order."""

    def __init__(self, stop: StopSignal, stop_at: int | None) -> None:
        self._stop, self._stop_at = stop, stop_at
        if stop_at == 0:
            stop.number = 15
        self.asked: list[int] = []
        self.rates: list[float] = []
        self.saved: list[RunState] = []
        self.seeds: list[int] = []
        self.order: list[str] = []

    def next(self, position: int) -> list[Microbatch]:
        self.asked.append(position)
        tokens = torch.full((2, 16), position % 97)
        return [Microbatch(tokens, tokens.roll(-1, dims=1))]

    def queued(self, state: RunState, _: Any, *, lr: float, **__: float) -> None:
        self.order.append(f"queue {state.step}")
        self.rates.append(lr)
        self.seeds.append(torch.initial_seed())
        if len(self.rates) == self._stop_at:
            self._stop.number = 15

    def settle(self, state: RunState) -> RunState:
        self.order.append(f"read {state.step}")
        return state

    def evaluate(self, step: int) -> tuple[float, None] | None:
        self.order.append(f"evaluate {step}")
        return None if self._stop.number else (1.0, None)

    def evaluated(self, state: RunState, *_: Any) -> None:
        self.order.append(f"evaluated {state.step}")

    def due(self, step: int) -> bool:
        return step % 3 == 0

    def take(self, state: RunState) -> None:
        self.order.append(f"copy {state.step}")

    def save(self, state: RunState) -> None:
        self.order.append(f"save {state.step}")
        self.saved.append(state)


CHANGES = [
    "train.steps=9",
    "schedule.warmup_steps=3",
    "checkpoint.every_steps=4",
    "eval.every_steps=6",
]


def run_loop(
    ranks: Ranks,
    start: int,
    stop_on_rank: int | None = None,
    stop_after: int = 2,
    ledger: Ledger = Ledger(),  # noqa: B008 - frozen
    owed: bool = False,
) -> tuple[dict[str, Any], RunState, Any]:
    cfg = recipe.load(RECIPE, CHANGES)
    model = sharded(ranks)
    optimizer = build_optimizer(model, cfg.optimizer)
    stop = StopSignal()
    seen: Any = Recorder(stop, stop_after if ranks.rank == stop_on_rank else None)
    services = Services(
        reduce_each=False,
        loader=seen,
        ledger=ledger,
        watch=seen,
        roll_back=seen,
        evaluate=seen.evaluate,
        evaluation_owed=owed,
        bad_samples=BadSamples(Journal(Path()), cfg.data),
        memory=seen,
        saver=seen,
        stop=stop,
        pulse=Pulse.create(),
        pace=Pace(ranks, Journal(Path()), Display(io.StringIO(), 9, 1)),  # nobody is slow
        injector=None,
    )
    begin = RunState(start, start * 32, start * 32 * cfg.model.max_seq_len)
    state, stopped_by = loop(cfg, begin, model, optimizer, services, ranks)
    return {k: v for k, v in vars(seen).items() if k[0] != "_"}, state, stopped_by


@pytest.mark.parametrize("start", [0, 5])
def test_each_step_has_its_samples_its_rate_and_its_seed(start: int) -> None:
    cfg = recipe.load(RECIPE, CHANGES)
    ((seen, state, stopped_by),) = on_ranks(1, run_loop, start)
    steps = list(range(start, 9))
    assert seen["asked"] == [32 * step for step in steps]
    rates = [learning_rate(cfg.schedule, cfg.optimizer.lr, step, 9) for step in steps]
    assert seen["rates"] == rates
    assert seen["seeds"] == [dropout_seed(cfg.seed, step, 0) for step in steps]
    assert [saved.step for saved in seen["saved"]] == [s for s in (4, 8, 9) if s > start]
    assert state == RunState(9, 9 * 32, 9 * 32 * cfg.model.max_seq_len)
    assert stopped_by is None


def test_after_a_step_come_evaluation_copy_and_save_each_with_the_result_read_before() -> None:
    ((seen, _, _),) = on_ranks(1, run_loop, 2)
    order = seen["order"]
    done = [event for event in order if not event.startswith(("queue", "read", "evaluated"))]
    assert done == (
        ["copy 3", "save 4", "evaluate 6", "copy 6", "save 8", "evaluate 9", "copy 9", "save 9"]
    )
    for event in done:
        assert order[order.index(event) - 1] == f"read {event.split()[1]}"


def test_a_step_is_queued_before_the_one_before_is_read() -> None:
    ((seen, _, _),) = on_ranks(1, run_loop, 6)
    assert seen["order"][:4] == ["read 6", "queue 7", "read 7", "queue 8"]
    assert len(seen["asked"]) == 3


def test_a_signal_on_one_rank_stops_all_of_them_after_the_same_saved_step() -> None:
    for seen, state, stopped_by in on_ranks(2, run_loop, 0, 1):
        assert stopped_by == 15
        assert state.step == 2
        assert [saved.step for saved in seen["saved"]] == [2]


def test_a_signal_before_the_first_step_saves_what_may_have_come_from_memory_alone() -> None:
    for start, saved in ((0, []), (5, [5])):
        for seen, state, stopped_by in on_ranks(2, run_loop, start, 1, 0):
            assert (state.step, stopped_by) == (start, 15)
            assert [of.step for of in seen["saved"]] == saved
            assert seen["asked"] == []


def test_an_evaluation_that_is_owed_comes_first() -> None:
    ((seen, *_),) = on_ranks(1, run_loop, 6, None, 2, Ledger(), True)
    assert seen["order"][:2] == ["evaluate 6", "evaluated 6"]
    ((done, *_),) = on_ranks(1, run_loop, 9, None, 2, Ledger(), True)
    assert done["order"] == ["evaluate 9", "evaluated 9"], "also after the last step"


def test_a_stopped_evaluation_is_not_recorded_and_its_step_is_saved() -> None:
    ((seen, state, stopped_by),) = on_ranks(1, run_loop, 4, 0)
    assert seen["order"][-5:] == ["evaluate 6", "read 6", "copy 6", "read 6", "save 6"]
    assert (state.step, stopped_by) == (6, 15)


def test_a_run_stopped_in_its_last_evaluation_is_not_done() -> None:
    ((_, state, stopped_by),) = on_ranks(1, run_loop, 7, 0)
    assert (state.step, stopped_by) == (9, 15)


def test_the_ledger_s_steps_are_left_out_and_its_windows_passed_over() -> None:
    skipped = Skipped(3, 64, 96, "bad")
    passed_over = RolledBack(4, 128, 224, "worse")
    ((seen, state, _),) = on_ranks(1, run_loop, 0, None, 2, Ledger((skipped, passed_over)))
    assert seen["asked"] == [0, 32, 96, 224, 256, 288, 320, 352]
    assert (state.step, state.samples) == (9, 384)
    assert state.tokens == on_ranks(1, run_loop, 0)[0][1].tokens, "the step counts"


def test_seeds_of_dropout_differ_between_steps_and_ranks() -> None:
    seeds = {dropout_seed(17, step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400


TAKEN, EVALUATED = {"step": 6, "loss": 4.5}, {"step": 6, "eval_loss": 4.6}


@pytest.mark.parametrize(
    ("lines", "owed"),
    [
        ([], True),
        ([TAKEN], True),
        ([TAKEN, EVALUATED], False),
        ([TAKEN, EVALUATED, {"step": 7, "loss": 4.5}], False),
        ([TAKEN, EVALUATED, TAKEN], True),  # rolled back in between: of other weights
        ([TAKEN, {"step": 60, "eval_loss": 4.6}], True),
    ],
)
def test_an_evaluation_is_owed_unless_it_came_after_the_last_time_its_step_was_taken(
    tmp_path: Path, lines: list[dict[str, Any]], owed: bool
) -> None:
    journal = Journal(tmp_path)
    for line in lines:
        journal.metrics(**line)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "eval_lo')  # a crash
    assert on_ranks(2, owed_at_six, tmp_path) == [owed] * 2


def owed_at_six(ranks: Ranks, run_dir: Path) -> bool:
    changes = [*CHANGES, "data.eval.path=somewhere"]
    return evaluation_owed(recipe.load(RECIPE, changes), run_dir, 6, ranks)


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
    beats: list[int] = []
    loss = evaluate(
        model,
        batches(ranks),
        next_token_loss,
        ranks.device,
        stop=lambda: False,
        beat=lambda: beats.append(1),
    )
    assert loss is not None
    assert len(beats) == len(batches(ranks))
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


def stopped_while_evaluating(ranks: Ranks) -> tuple[float | None, int, bool]:
    model = sharded(ranks, DROPPING)
    beats: list[int] = []
    loss = evaluate(
        model,
        batches(ranks),
        next_token_loss,
        ranks.device,
        stop=lambda: ranks.rank == 1 and len(beats) == 2,
        beat=lambda: beats.append(1),
    )
    return loss, len(beats), model.training


def test_an_evaluation_stops_on_all_ranks_at_the_same_batch_if_one_is_asked_to() -> None:
    assert on_ranks(2, stopped_while_evaluating) == [(None, 2, True)] * 2
