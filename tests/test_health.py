"""Laws of verdicts: what counts as a spike, what is remembered, when a run must go back."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt.health import (
    DEVIATION_FLOOR,
    after,
    before_streak,
    loss_limit,
    must_roll_back,
    why_skipped,
)
from mpt.recipe.train import Health
from mpt.state import RunState, Streak, Vitals

CFG = Health(spike_sigmas=4.0, spike_window=8, max_skipped_in_a_row=3)
SAMPLES = 6
PASSED_OVER = 12


def take(vitals: Vitals, step: int, loss: float, applied: bool = True) -> Vitals:
    start = PASSED_OVER + SAMPLES * (step - 1)
    return after(
        vitals,
        step=step,
        before=start - PASSED_OVER,
        start=start,
        stop=start + SAMPLES,
        loss=loss,
        applied=applied,
        window=CFG.spike_window,
    )


def after_losses(*losses: float) -> Vitals:
    vitals = Vitals()
    for step, loss in enumerate(losses, start=1):
        vitals = take(vitals, step, loss)
    return vitals


def test_the_limit_is_the_mean_and_so_many_population_deviations_of_the_window() -> None:
    losses = [9.0, 4.0, 4.2, 3.9, 4.1, 4.0, 3.8, 4.3, 4.0, 9.9]
    wanted = statistics.fmean(losses[1:9]) + 4.0 * statistics.pstdev(losses[1:9])
    assert loss_limit(after_losses(*losses), 11, CFG) == pytest.approx(wanted, rel=1e-12)


def test_there_is_no_limit_before_the_window_is_full() -> None:
    losses = [4.0] * 8
    assert loss_limit(after_losses(*losses), 9, CFG) == math.inf
    assert loss_limit(after_losses(*losses), 10, CFG) < math.inf
    assert loss_limit(Vitals(), 1, CFG) == math.inf


@given(st.lists(st.floats(0.1, 20.0), min_size=1, max_size=30))
def test_the_limit_does_not_know_whether_the_last_result_was_read_early(
    losses: list[float],
) -> None:
    step = len(losses) + 1
    assert loss_limit(after_losses(*losses), step, CFG) == loss_limit(
        after_losses(*losses[:-1]), step, CFG
    )


def test_a_loss_that_hardly_varies_does_not_trip_on_rounding() -> None:
    limit = loss_limit(after_losses(*[4.0] * 12), 13, CFG)
    assert limit == pytest.approx(4.0 + 4.0 * DEVIATION_FLOOR)


def test_sigmas_of_infinity_turn_spikes_off() -> None:
    off = replace(CFG, spike_sigmas=math.inf)
    for losses in ([4.0] * 12, [4.0, 5.0] * 6, []):
        assert loss_limit(after_losses(*losses), 13, off) == math.inf


def test_only_applied_losses_are_remembered_so_that_none_poisons_the_window() -> None:
    sound = after_losses(*[4.0, 5.0] * 6)
    for bad in (math.nan, math.inf, 900.0):
        vitals = take(sound, 13, bad, applied=False)
        assert vitals.losses == sound.losses
        assert loss_limit(take(vitals, 14, 4.5), 15, CFG) == loss_limit(sound, 15, CFG)


def test_a_longer_window_after_a_resume_fills_up_and_a_shorter_one_takes_the_latest() -> None:
    vitals = after_losses(*[4.0, 5.0] * 6)
    assert loss_limit(vitals, 14, replace(CFG, spike_window=16)) == math.inf
    assert loss_limit(vitals, 14, replace(CFG, spike_window=2)) == 4.5 + 4.0 * 0.5


def test_a_streak_knows_where_it_began_and_one_good_step_ends_it() -> None:
    vitals = after_losses(4.0, 4.0)
    seen = []
    for step in (3, 4, 5):
        vitals = take(vitals, step, math.nan, applied=False)
        seen.append((vitals.streak, must_roll_back(vitals, CFG)))
    assert seen == [
        (Streak(1, 2, 12, 24, 30), False),
        (Streak(2, 2, 12, 24, 36), False),
        (Streak(3, 2, 12, 24, 42), True),
    ]
    assert take(vitals, 6, 4.0).streak == Streak()


def test_what_is_saved_within_a_streak_is_the_state_before_it() -> None:
    good = RunState(2, 12, 200, after_losses(4.0, 4.0))
    vitals = good.vitals
    assert before_streak(good, 100) == good
    for step in (3, 4, 5):
        vitals = take(vitals, step, math.nan, applied=False)
        state = RunState(step, PASSED_OVER + SAMPLES * step, 100 * step, vitals)
        assert before_streak(state, 100) == good


def test_the_reason_names_the_numbers() -> None:
    assert why_skipped(math.nan, 1.0, 5.0, CFG) == "loss nan or gradient norm 1.0 is not finite"
    assert "gradient norm inf" in why_skipped(4.0, math.inf, 5.0, CFG)
    words = "loss 9.2500 is above 5.0000, the mean of 8 steps + 4 sigma"
    assert why_skipped(9.25, 1.0, 5.0, CFG) == words


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(finite, max_size=9), st.integers(0, 3))
def test_a_state_comes_back_from_json_bit_for_bit(losses: list[float], n_skipped: int) -> None:
    vitals = after_losses(*losses)
    for step in range(len(losses) + 1, len(losses) + 1 + n_skipped):
        vitals = take(vitals, step, math.nan, applied=False)
    step = len(losses) + n_skipped
    state = RunState(step, PASSED_OVER + step * SAMPLES, step * 100, vitals)
    back = RunState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert back == state
    assert [math.copysign(1, loss) for _, loss in back.vitals.losses] == [
        math.copysign(1, loss) for loss in losses[-9:]
    ]


SOUND = RunState(5, 30, 99, Vitals(((1, 4.5), (3, 4.25)), Streak(2, 3, 12, 18, 30)), 7)


def changed(path: str, value: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(json.dumps(SOUND.to_json()))
    *way, last = path.split(".")
    place = raw
    for key in way:
        place = place[key]
    place[last] = value
    return raw


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        {},
        {"step": 1},
        changed("extra", 1),
        changed("step", -1),
        changed("step", True),
        changed("step", 5.0),
        changed("step", 1 << 63),
        changed("samples", "30"),
        changed("tokens", None),
        changed("vitals", None),
        changed("vitals.extra", 1),
        changed("vitals.losses", {"1": 4.5}),
        changed("vitals.losses", [[1, 4.5, 0]]),
        changed("vitals.losses", [[1, math.nan]]),
        changed("vitals.losses", [[1, math.inf]]),
        changed("vitals.losses", [[1, "4.5"]]),
        changed("vitals.losses", [[1.0, 4.5]]),
        changed("vitals.losses", [[0, 4.5]]),
        changed("vitals.losses", [[3, 4.5], [1, 4.5]]),
        changed("vitals.losses", [[6, 4.5]]),
        changed("vitals.streak", None),
        changed("vitals.streak.n", 3),
        changed("vitals.streak.n", 0),
        changed("vitals.streak.after_samples", 24),
        changed("vitals.streak.after_samples", None),
        changed("vitals.streak.stop", 18),
        changed("vitals.streak.stop", 36),
    ],
)
def test_a_state_that_cannot_be_is_refused(raw: object) -> None:
    assert RunState.from_json(changed("step", 5)) == SOUND
    with pytest.raises(ValueError, match=r"."):
        RunState.from_json(raw)
