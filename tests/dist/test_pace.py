"""A rank that holds up the others is named, and one that only waits for them is not."""

from __future__ import annotations

import io
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from mpt.display import Display
from mpt.dist import Ranks
from mpt.log import Journal, read_lines
from mpt.objective import next_token_loss
from mpt.optim import build_optimizer
from mpt.recipe.train import Optimizer
from mpt.rundir import EVENTS
from mpt.state import Loss, Microbatch
from mpt.train.pace import HostClock, Pace, own_work_s, time_collectives
from mpt.train.step import train_step
from mpt.train.straggler import LEAST_S, WINDOW, WINDOWS, Busy, Slow, Suspicion, slow_ranks
from tests.dist.running import DONE, prepared, run
from tests.tiny_model import digest, sharded, weights_of
from tests.world import on_ranks

SLOW_S = 0.05
NAMED_WITHIN = 50
ENOUGH = 1 + WINDOW * WINDOWS
"""Steps after which a rank that was slow from the beginning is named; the first does not count."""

Events = dict[str, list[dict[str, Any]]]

Place = Literal["data", "forward", "backward", "collective"]


@dataclass(frozen=True)
class Delay:
    """What is injected: some ranks sleep in one place of each step, up to a last one."""

    place: Place = "data"
    ranks: tuple[int, ...] = ()
    first: int = 0
    last: int = 1000

    def rest(self, ranks: Ranks, place: Place, step: int) -> None:
        if place == self.place and ranks.rank in self.ranks and self.first <= step <= self.last:
            time.sleep(SLOW_S)


def train(ranks: Ranks, run_dir: Path, steps: int, delay: Delay, timed: bool) -> str:
    """Take steps as the loop does, and return a hash of the weights."""
    model = sharded(ranks)
    optimizer = build_optimizer(model, Optimizer(lr=1e-3))
    pace = Pace(ranks, Journal(run_dir), Display(io.StringIO(), steps, 1))
    if timed:
        time_collectives(model, pace.waiting)
    tokens = torch.arange(32).view(2, 16) + ranks.rank
    step = 0
    norm: nn.Module = model.transformer.blocks[0].norm_1  # type: ignore[union-attr, index]
    norm.register_full_backward_hook(lambda *_: delay.rest(ranks, "backward", step))

    for step in range(1, steps + 1):

        def objective(model: nn.Module, part: Microbatch, step: int = step) -> Loss:
            delay.rest(ranks, "forward", step)
            return next_token_loss(model, part)

        pace.begin()
        delay.rest(ranks, "data", step)
        with pace.waiting():
            delay.rest(ranks, "collective", step)
        train_step(
            model,
            optimizer,
            [Microbatch(tokens, tokens.roll(-1, dims=1))],
            objective,
            max_grad_norm=1.0,
            waiting=pace.waiting,
        )
        pace.end(step)
    return digest(weights_of(model))


def train_all(ranks: Ranks, root: Path, runs: dict[str, tuple[int, Delay]]) -> list[str]:
    return [train(ranks, root / name, steps, delay, True) for name, (steps, delay) in runs.items()]


def events(root: Path, world_size: int, runs: dict[str, tuple[int, Delay]]) -> Events:
    """Return what each of several runs has told, trained one after the other on the same ranks."""
    for name in runs:
        (root / name).mkdir()
    on_ranks(world_size, train_all, root, runs)
    return {name: list(read_lines(root / name / EVENTS)) for name in runs}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Events:
    """What was told of pairs of ranks."""
    began, ended = 9, 9 + NAMED_WITHIN
    runs = {
        "slow in its backward": (ENOUGH, Delay("backward", (1,))),
        "slow for a while": (ended + 50, Delay("forward", (1,), began, ended)),
        "alike": (ENOUGH, Delay()),
        "both slow": (ENOUGH, Delay("forward", (0, 1))),
        "late to collectives": (ENOUGH, Delay("collective", (1,))),
    }
    return events(tmp_path_factory.mktemp("pairs"), 2, runs)


def test_a_rank_that_takes_longer_in_each_step_is_named(told: Events) -> None:
    (event,) = told["slow in its backward"]
    assert (event["event"], event["rank"]) == ("straggler", 1)
    assert event["host"] == socket.gethostname()
    assert event["excess_s"] == pytest.approx(event["busy_s"] - event["others_s"], abs=1e-4)
    assert f"rank 1 on {socket.gethostname()} is slow" in event["why"]


def test_a_rank_that_begins_to_be_slow_is_named_in_time_and_cleared_afterwards(
    told: Events,
) -> None:
    named, cleared = told["slow for a while"]
    assert (named["event"], named["rank"]) == ("straggler", 1)
    assert (cleared["event"], cleared["rank"]) == ("straggler_recovered", 1)
    assert 9 < named["step"] <= 9 + NAMED_WITHIN < cleared["step"]


@pytest.mark.parametrize("how", ["alike", "both slow", "late to collectives"])
def test_nobody_is_named_where_no_rank_works_longer_than_the_others(told: Events, how: str) -> None:
    assert told[how] == []


def test_in_a_whole_run_a_rank_that_is_late_with_its_data_is_named(tmp_path: Path) -> None:
    cfg = prepared(tmp_path)
    cfg = replace(cfg, train=replace(cfg.train, steps=ENOUGH))
    faults = {"slow_rank": 1, "slow_s": SLOW_S}
    assert run(cfg, tmp_path / "run", nproc=2, faults=faults) == [DONE]
    told = [e for e in read_lines(tmp_path / "run" / EVENTS) if e["event"] == "straggler"]
    assert [(event["rank"], event["step"], event["attempt"]) for event in told] == [(1, ENOUGH, 0)]


def test_of_three_ranks_the_slow_one_is_named(tmp_path: Path) -> None:
    found = events(tmp_path, 3, {"run": (ENOUGH, Delay("forward", (2,)))})
    assert [(event["event"], event["rank"]) for event in found["run"]] == [("straggler", 2)]


def test_a_single_rank_has_nobody_to_be_slower_than(tmp_path: Path) -> None:
    assert events(tmp_path, 1, {"run": (ENOUGH, Delay("data", (0,)))}) == {"run": []}


def test_taking_the_time_changes_no_bit(tmp_path: Path) -> None:
    plain = on_ranks(2, train, tmp_path, 5, Delay(), False)
    assert on_ranks(2, train, tmp_path, 5, Delay(), True) == plain


def test_waits_that_overlap_are_counted_once() -> None:
    clock = HostClock()
    assert own_work_s(clock, 10.0, [], 20.0) == 10.0
    assert own_work_s(clock, 10.0, [(12.0, 15.0), (11.0, 13.0), (12.5, 14.0)], 20.0) == 6.0
    assert own_work_s(clock, 10.0, [(18.0, 25.0)], 20.0) == 8.0, "it goes on into the next step"


EVEN = Busy(0.09, 0.10, 0.11)


def test_only_a_rank_that_is_slower_in_nearly_every_step_is_slow() -> None:
    slower = Busy(0.14, 0.15, 0.16)
    noisy = Busy(0.10, 0.15, 0.30)
    at_times = Busy(0.09, 0.10, 0.30)
    assert [slow.rank for slow in slow_ranks([EVEN, slower])] == [1]
    assert [slow.rank for slow in slow_ranks([EVEN, EVEN, slower, EVEN])] == [2]
    assert slow_ranks([EVEN, slower])[0].excess_s == pytest.approx(0.05)
    assert slow_ranks([EVEN, noisy]) == slow_ranks([at_times, slower]) == []
    assert slow_ranks([EVEN, EVEN]) == slow_ranks([slower]) == []


def test_a_small_difference_is_no_slowness() -> None:
    def pair(busy_s: float, more_s: float) -> list[Slow]:
        return slow_ranks([Busy(busy_s, busy_s, busy_s), Busy(*[busy_s + more_s] * 3)])

    assert pair(0.001, 0.9 * LEAST_S) == [], "of a very short step"
    assert pair(10.0, 0.4) == [], "of a long step: 4 %"
    assert pair(10.0, 0.6) != []


def test_a_rank_is_named_after_enough_windows_in_a_row_and_once() -> None:
    slow = [Slow(1, 0.2, 0.1)]
    suspicion = Suspicion()
    told = []
    for found in [slow, slow, [], slow, slow, slow, slow, [], [], slow, [], [], [], [], slow]:
        suspicion, named, cleared = suspicion.after(found)
        told.append([f"named {s.rank}" for s in named] + [f"cleared {rank}" for rank in cleared])
    assert [(i, what) for i, what in enumerate(told) if what] == [
        (5, ["named 1"]),
        (12, ["cleared 1"]),
    ]
