"""Bad steps are skipped, and a run that cannot go on goes back: on real ranks, to the last bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpt.checkpoint.layout import committed, step_directory, step_of
from mpt.launch.pulse import Phase
from mpt.ledger import RolledBack, Skipped
from mpt.recipe.train import Checkpoint
from mpt.rundir import CHECKPOINTS, EVENTS, LEDGER, METRICS
from tests.dist.running import (
    DONE,
    ROLLED_BACK,
    SAMPLES,
    STEPS,
    STOPPED,
    assert_one_pass,
    entries,
    final,
    prepared,
    replay,
    run,
)


def read(run_dir: Path, name: str, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a log; of events, those of one kind."""
    found = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [line for line in found if kind is None or line.get("event") == kind]


def where(step: int) -> tuple[int, int]:
    """Return where a step of a run that has passed over nothing begins and ends."""
    return SAMPLES * (step - 1), SAMPLES * step


def test_nan_and_spike_on_one_rank_are_skipped_on_all_and_a_replay_ends_alike(
    tmp_path: Path,
) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    faults = {"nan_steps": [5], "spike_steps": [12]}
    assert run(cfg, run_dir, nproc=2, faults=faults) == [DONE]
    nan, spike = entries(run_dir)
    assert nan == Skipped(5, *where(5), nan.why)
    assert spike == Skipped(12, *where(12), spike.why)
    assert "is not finite" in nan.why
    assert "the mean of 4 steps + 6 sigma" in spike.why
    told = [(e["step"], e["positions"]) for e in read(run_dir, EVENTS, "skipped")]
    assert told == [(5, list(where(5))), (12, list(where(12)))]
    applied = {m["step"]: m["applied"] for m in read(run_dir, METRICS) if "loss" in m}
    assert [step for step, was in applied.items() if not was] == [5, 12]
    weights, state = final(run_dir)
    assert 5 not in dict(state.vitals.losses)
    assert_one_pass(run_dir)

    assert run(cfg, tmp_path / "clean", nproc=2) == [DONE]
    assert final(tmp_path / "clean")[0] != weights, "two updates less"
    assert replay(cfg, run_dir, tmp_path / "copy", nproc=2) == [DONE]
    assert final(tmp_path / "copy") == (weights, state)
    assert entries(tmp_path / "copy") == (nan, spike), "nothing is written twice"
    assert read(tmp_path / "copy", EVENTS, "skipped") == [], "nor told"


def test_statistics_survive_a_resume_so_that_it_decides_as_if_there_had_been_none(
    tmp_path: Path,
) -> None:
    # So few sigmas that ordinary losses count as spikes, and so many skips that none rolls back.
    cfg = prepared(tmp_path, spike_sigmas=0.2, max_skipped_in_a_row=STEPS)
    assert run(cfg, tmp_path / "whole") == [DONE]
    assert len(entries(tmp_path / "whole")) > 2
    stops = [(Phase.STEP, 9), (Phase.STEP, 12), (Phase.STEP, 15)]
    assert run(cfg, tmp_path / "cut", stops=stops) == [STOPPED] * 3 + [DONE]
    resumed = [e["step"] for e in read(tmp_path / "cut", EVENTS, "resumed")]
    assert resumed == [10, 13, 13], "after step 16 it was stopped too, but 14 to 16 were skipped"
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole"), "down to the limits they name"
    assert final(tmp_path / "cut") == final(tmp_path / "whole")


def test_bad_steps_in_a_row_roll_back_and_their_data_is_passed_over(tmp_path: Path) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    faults = {"nan_steps": [3, 10, 11, 12]}
    assert run(cfg, run_dir, nproc=2, faults=faults) == [ROLLED_BACK, DONE]
    *skipped, back = entries(run_dir)
    assert [e.step for e in skipped if isinstance(e, Skipped)] == [3, 10, 11, 12]
    assert back == RolledBack(9, 36, 48, back.why)
    (event,) = read(run_dir, EVENTS, "rollback")
    assert (event["from_step"], event["to_step"], event["positions"]) == (12, 8, [36, 48])
    assert event["why"] == back.why
    assert "steps 10 to 12 were skipped in a row" in back.why
    assert [e["step"] for e in read(run_dir, EVENTS, "resumed")] == [8]
    assert_one_pass(run_dir)
    applied = {m["step"]: m["applied"] for m in read(run_dir, METRICS) if "loss" in m}
    assert [step for step, was in applied.items() if not was] == [3], "in the final lineage"
    weights, state = final(run_dir)
    assert state.samples == (STEPS + 3) * SAMPLES
    assert replay(cfg, run_dir, tmp_path / "copy", nproc=2) == [DONE]
    assert final(tmp_path / "copy") == (weights, state)


def test_a_streak_over_resumes_is_one_streak_and_nothing_is_saved_from_within_it(
    tmp_path: Path,
) -> None:
    cfg = prepared(tmp_path)
    faults = {"nan_steps": [14, 15, 16]}
    assert run(cfg, tmp_path / "whole", faults=faults) == [ROLLED_BACK, DONE]
    run_dir = tmp_path / "cut"
    ends = run(cfg, run_dir, faults=faults, stops=[(Phase.STEP, 13), (Phase.FIRST_STEP, 14)])
    assert ends == [STOPPED, STOPPED, ROLLED_BACK, DONE]
    assert entries(run_dir) == entries(tmp_path / "whole")
    assert final(run_dir) == final(tmp_path / "whole")
    assert [e["step"] for e in read(run_dir, EVENTS, "resumed")] == [13, 13, 13]
    assert [step_of(path) for path in committed(run_dir / CHECKPOINTS)] == [18, 16, 13, 12, 8, 4]


def test_what_a_longer_run_rolls_back_from_is_set_aside(tmp_path: Path) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    faults = {"nan_steps": [17, 18, 19]}
    assert run(cfg, run_dir, faults=faults) == [DONE]
    longer = replace(cfg, train=replace(cfg.train, steps=STEPS + 4))
    assert run(longer, run_dir, faults=faults) == [ROLLED_BACK, DONE]
    assert [e["step"] for e in read(run_dir, EVENTS, "resumed")] == [18, 16]
    aside = [path.name for path in (run_dir / CHECKPOINTS).iterdir() if "rolled" in path.name]
    assert aside == ["step-00000018.rolled-back"]
    assert_one_pass(run_dir, STEPS + 4)


def test_a_rollback_that_was_killed_before_its_line_is_done_again(tmp_path: Path) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    kept: list[bytes] = []

    def tear(number: int) -> None:
        if number == 1:
            whole = (run_dir / LEDGER).read_bytes()
            kept.append(whole)
            (run_dir / LEDGER).write_bytes(whole[: whole.rindex(b"{") + 20])

    ends = run(cfg, run_dir, faults={"nan_steps": [10, 11, 12]}, before=tear)
    assert ends == [ROLLED_BACK, ROLLED_BACK, DONE]
    *skipped, back = entries(run_dir)
    assert len(skipped) == 3
    assert isinstance(back, RolledBack)
    assert (back.start, back.stop) == (36, 48)
    assert_one_pass(run_dir)


def test_saves_within_a_streak_do_not_crowd_out_the_one_to_go_back_to(tmp_path: Path) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    cfg = replace(cfg, checkpoint=Checkpoint(every_steps=1, keep=1))
    assert run(cfg, run_dir, faults={"nan_steps": [10, 11, 12]}) == [ROLLED_BACK, DONE]
    assert [e["step"] for e in read(run_dir, EVENTS, "resumed")] == [9]
    assert [step_of(path) for path in committed(run_dir / CHECKPOINTS)] == [18]


def test_a_run_that_has_saved_nothing_goes_back_to_its_beginning(tmp_path: Path) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    assert run(cfg, run_dir, faults={"nan_steps": [1, 2, 3]}) == [ROLLED_BACK, DONE]
    (event,) = read(run_dir, EVENTS, "rollback")
    assert (event["from_step"], event["to_step"], event["positions"]) == (3, 0, [0, 12])
    assert not read(run_dir, EVENTS, "resumed")
    assert_one_pass(run_dir)


def test_a_run_that_has_used_up_its_rollbacks_ends_as_diverged_and_can_be_helped(
    tmp_path: Path,
) -> None:
    cfg, run_dir = prepared(tmp_path, max_rollbacks=1), tmp_path / "run"
    faults = {"nan_steps": [6, 7, 8, 10, 11, 12]}
    back, diverged = run(cfg, run_dir, nproc=2, faults=faults)
    assert back == ROLLED_BACK
    assert "steps 10 to 12 were skipped in a row" in diverged
    assert "positions 48 to 59" in diverged
    assert f"mpt resume {run_dir} health.max_rollbacks=4 optimizer.lr=LOWER" in diverged
    assert [e["step"] for e in read(run_dir, EVENTS, "diverged")] == [12]
    assert sum(isinstance(e, RolledBack) for e in entries(run_dir)) == 1

    assert run(prepared(tmp_path, max_rollbacks=2), run_dir) == [ROLLED_BACK, DONE]
    assert "the last because the ledger says so" in read(run_dir, EVENTS, "rollback")[-1]["why"]
    assert_one_pass(run_dir)


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    lines = read(run_dir, METRICS)
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_stopped_within_an_evaluation_has_each_of_them_once(
    tmp_path: Path, nproc: int
) -> None:
    cfg = prepared(tmp_path)
    assert run(cfg, tmp_path / "whole", nproc=nproc) == [DONE]
    run_dir = tmp_path / "cut"
    stops = [(Phase.EVALUATE, 6), (Phase.EVALUATE, 12), (Phase.EVALUATE, 18)]
    assert run(cfg, run_dir, nproc=nproc, stops=stops) == [STOPPED] * 3 + [DONE]
    assert evaluations(run_dir) == evaluations(tmp_path / "whole")
    assert [step for step, _ in evaluations(run_dir)] == [6, 12, 18]
    assert final(run_dir) == final(tmp_path / "whole")
    assert [e["step"] for e in read(run_dir, EVENTS, "resumed")] == [6, 12, 18]


def test_a_resume_at_a_step_that_was_evaluated_does_not_evaluate_it_again(tmp_path: Path) -> None:
    cfg, run_dir = prepared(tmp_path), tmp_path / "run"
    assert run(cfg, run_dir) == [DONE]
    for step in (16, 18):
        shutil.rmtree(step_directory(run_dir / CHECKPOINTS, step))
    assert run(cfg, run_dir) == [DONE]
    assert [e["step"] for e in read(run_dir, EVENTS, "resumed")] == [12]
    assert [step for step, _ in evaluations(run_dir)] == [6, 12, 18, 18]
    assert run(cfg, run_dir) == [DONE]
    assert len(evaluations(run_dir)) == 4, "nor does a run that is done"
