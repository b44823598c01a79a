"""Faults on request: only those asked for, once in a run directory, none from a typing error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpt.dist import Ranks
from mpt.errors import UsageError
from mpt.launch.attempt import INJECT
from mpt.log import read_lines
from mpt.rundir import EVENTS
from mpt.state import Loss, Microbatch
from mpt.train.inject import SPIKE, Faults, Injector, parse_faults
from tests.world import on_ranks

BATCH = Microbatch(torch.zeros(1, 1), torch.zeros(1, 1))


def rank(number: int, world_size: int = 2) -> Ranks:
    nothing: Any = None
    return Ranks(number, number, world_size, torch.device("cpu"), nothing, nothing)


def injector(run_dir: Path, number: int, **faults: Any) -> Injector:
    found = Injector.wanted({INJECT: json.dumps(faults)}, run_dir, rank(number))
    assert found is not None
    return found


def two(_: nn.Module, __: Microbatch) -> Loss:
    return Loss(torch.tensor(3.0), torch.tensor(2.0))


def spoiled(faults: Injector, step: int) -> float:
    loss = faults.spoil(two, step)(nn.Identity(), BATCH)
    assert float(loss.objective) == pytest.approx(float(loss.nats) * 1.5, nan_ok=True)
    return float(loss.nats)


def test_nothing_is_injected_where_nothing_is_asked_for(tmp_path: Path) -> None:
    assert Injector.wanted({}, tmp_path, rank(0)) is None


def test_a_loss_is_spoiled_on_the_last_rank_at_its_step_once(tmp_path: Path) -> None:
    def losses(number: int) -> list[float]:
        faults = injector(tmp_path, number, nan_steps=[3], spike_steps=[4])
        return [spoiled(faults, step) for step in range(1, 6)]

    assert losses(0) == [2.0] * 5
    assert str(losses(1)) == str([2.0, 2.0, math.nan, 2.0 * SPIKE, 2.0])
    assert losses(1) == [2.0] * 5, "a restart does not meet it again"
    told = [(e["event"], e["rank"], e["step"]) for e in read_lines(tmp_path / EVENTS)]
    assert told == [("injected", 1, 3), ("injected", 1, 4)]


def test_an_exception_comes_on_its_rank_at_its_step_once(tmp_path: Path) -> None:
    for number in (0, 1):
        faults = injector(tmp_path, number, raise_step=[[2, 1]])
        faults.begin(1)
        if number == 1:
            with pytest.raises(RuntimeError, match="injected"):
                faults.begin(2)
        faults.begin(2)


def segfault(ranks: Ranks, run_dir: Path) -> None:
    injector(run_dir, ranks.rank, segv_step=[[1, 0]]).begin(1)


def test_a_segmentation_fault_is_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0 died without a word"):
        on_ranks(1, segfault, tmp_path)


def test_what_is_asked_for_is_what_is_read() -> None:
    text = (
        '{"nan_steps": [17], "slow_rank": 1, "slow_s": 0.05, "raise_step": [[12, 0]], '
        '"loop_step": [[12, 1]], "gil_step": [[9, 0]], "segv_step": [[5, 1]], "spike_steps": [40]}'
    )
    assert parse_faults(text) == Faults(
        nan_steps=(17,),
        spike_steps=(40,),
        raise_step=((12, 0),),
        loop_step=((12, 1),),
        gil_step=((9, 0),),
        segv_step=((5, 1),),
        slow_rank=1,
        slow_s=0.05,
    )
    assert parse_faults("{}") == Faults()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nan",
        '{"nan_step": [17]}',
        '{"nan_steps": 17}',
        '{"nan_steps": ["17"]}',
        '{"nan_steps": [true]}',
        '{"raise_step": [12, 0]}',
        '{"raise_step": [[12]]}',
        '{"loop_step": [[12, 0, 1]]}',
        '{"slow_rank": -1}',
        '{"slow_s": NaN}',
        '{"slow_s": Infinity}',
        '{"slow_s": "1"}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"^MPT_INJECT: .*\.$"):
        parse_faults(text)
