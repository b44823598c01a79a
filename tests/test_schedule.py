"""The learning rate is a function of the step with the shape its name says."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest

from mpt.recipe.train import Schedule
from mpt.schedule import learning_rate

STEPS = 100
Name = Literal["cosine", "linear", "constant", "wsd"]
NAMES: tuple[Name, ...] = ("cosine", "linear", "constant", "wsd")


def curve(cfg: Schedule, steps: int = STEPS) -> list[float]:
    return [learning_rate(cfg, 2.0, step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_linearly_to_the_peak_and_never_above(name: Name) -> None:
    rates = curve(Schedule(name=name, warmup_steps=10))
    rises = [b - a for a, b in pairwise(rates[:11])]
    assert rises == pytest.approx([2.0 / 11] * 10)
    assert rates[10] == max(rates) == 2.0
    assert rates[0] > 0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_final_fraction_and_nothing_rises_after_warm_up(
    name: Name, final: float
) -> None:
    rates = curve(Schedule(name=name, warmup_steps=10, final=final))
    assert rates[-1] == pytest.approx(2.0 * final)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_half_way_down_a_cosine_is_half_of_the_fall() -> None:
    rates = curve(Schedule(name="cosine", final=0.0), steps=101)
    assert rates[50] == pytest.approx(1.0)
    assert rates[25] == pytest.approx(1 + math.cos(math.pi / 4))


def test_wsd_is_flat_until_its_decay() -> None:
    rates = curve(Schedule(name="wsd", warmup_steps=10, decay_steps=20, final=0.0))
    assert set(rates[10:80]) == {2.0}
    assert rates[80] < 2.0
    assert rates[-1] == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_finite_positive_rates(name: Name, steps: int) -> None:
    rates = curve(Schedule(name=name), steps)
    assert all(0 < rate <= 2.0 for rate in rates)
