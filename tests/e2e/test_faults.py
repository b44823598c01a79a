"""Ranks that die, hang or are wrong: each is repaired, or not retried, and no bit is changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Small, await_that, lines
from tests.e2e.test_resume import clean, final_weights  # noqa: F401 - a fixture

KILLS = 20


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in lines(run_dir / "events.jsonl") if e["event"] == kind]


def pids(run_dir: Path, attempt: int, steps: int = 1) -> list[int] | None:
    """The workers of an attempt, once it has finished so many steps of its own."""
    starts = [e for e in events(run_dir, "attempt_started") if e["attempt"] == attempt]
    taken = [r for r in lines(run_dir / "metrics.jsonl") if r.get("attempt") == attempt]
    return starts[0]["pids"] if starts and len(taken) >= steps else None


def has_faults(run_dir: Path, count: int) -> bool:
    return len(events(run_dir, "fault")) >= count


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


@pytest.fixture
def start(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    """Start a run of two ranks, told what is to go wrong inside of them."""

    def begin(
        *changes: str, inject: dict[str, Any] | None = None
    ) -> tuple[subprocess.Popen[str], Path]:
        run_dir = tmp_path / "run"
        arguments = ["train", str(small.recipe), "--run-dir", str(run_dir), "--nproc", "2"]
        environment = {} if inject is None else {"MPT_INJECT": json.dumps(inject)}
        process = small.start(*arguments, *changes, environment=environment)
        children.append(process)
        return process, run_dir

    return begin


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        _, said = process.communicate(timeout=200)  # before the test's own limit, to say why
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it did not end: {process.communicate()[1]}") from None
    assert process.returncode == code, said
    assert "Traceback" not in said, said
    return said


@pytest.mark.timeout(900)  # twenty starts, on whatever machine
def test_twenty_kills_at_random_steps_are_repaired_twenty_times(
    start: Callable[..., Any], small: Small, tmp_path: Path
) -> None:
    steps = "train.steps=60"
    undisturbed = tmp_path / "undisturbed"
    small.mpt("train", small.recipe, "--run-dir", undisturbed, "--nproc", "2", steps)
    dice = random.Random(7)
    process, run_dir = start(
        steps, "launch.max_restarts=20", inject={"slow_rank": 0, "slow_s": 0.1}
    )
    for attempt in range(KILLS):
        workers = await_that(partial(pids, run_dir, attempt, 2), process)
        os.kill(dice.choice(workers), signal.SIGKILL)
        await_that(partial(has_faults, run_dir, attempt + 1), process)
    end(process)
    faults = events(run_dir, "fault")
    assert [fault["kind"] for fault in faults] == ["killed"] * KILLS
    assert final_weights(run_dir, 60) == final_weights(undisturbed, 60)


def test_a_crash_an_abort_and_an_exception_are_repaired(
    start: Callable[..., Any],
    clean: Path,  # noqa: F811
) -> None:
    inject = {"segv_step": [[5, 1]], "raise_step": [[9, 0]], "slow_rank": 1, "slow_s": 0.05}
    process, run_dir = start(inject=inject)
    third = await_that(lambda: pids(run_dir, 2), process)
    os.kill(third[1], signal.SIGABRT)
    end(process)
    crash, exception, abort = events(run_dir, "fault")
    assert (crash["kind"], crash["rank"], crash["step"]) == ("killed", 1, 4)
    assert "SIGSEGV" in crash["why"]
    assert (exception["kind"], exception["rank"], exception["step"]) == ("failed", 0, 8)
    assert "RuntimeError: injected" in exception["why"]
    assert "SIGABRT" in abort["why"]
    assert final_weights(run_dir) == final_weights(clean)


def test_a_rank_that_is_stopped_loops_or_holds_the_lock_is_found_named_and_repaired(
    start: Callable[..., Any],
    clean: Path,  # noqa: F811
) -> None:
    inject = {"loop_step": [[6, 0]], "gil_step": [[10, 1]], "slow_rank": 1, "slow_s": 0.05}
    # A busy disk must not look like a hang, nor a hang in a first step last for half an hour.
    patience = [f"launch.hang.{phase}=8" for phase in ("min_s", "save_s", "eval_s")]
    process, run_dir = start(*patience, "launch.hang.first_step_s=30", inject=inject)
    third = await_that(lambda: pids(run_dir, 2), process)
    os.kill(third[0], signal.SIGSTOP)
    said = end(process)
    loop, lock, stopped = events(run_dir, "fault")
    assert [fault["kind"] for fault in (loop, lock, stopped)] == ["hang"] * 3
    assert (loop["rank"], lock["rank"], stopped["rank"]) == (0, 1, 0)
    for fault in (loop, lock, stopped):
        waits = 1 - fault["rank"]
        assert f"rank {fault['rank']} " in fault["why"].split(";")[0]
        assert f"rank {waits} waits for it" in fault["why"]
        assert "step" in fault["why"]
        assert fault["why"] in said
    assert "mpt/train/inject.py" in loop["why"]
    assert "mpt/train/inject.py" in lock["why"]
    assert "SIGSTOP" in stopped["why"]
    for attempt in range(3):
        for rank in range(2):
            stacks = run_dir / "logs" / f"attempt-{attempt}" / f"rank-{rank}.stacks"
            assert "most recent call first" in stacks.read_text(), "dumped before the kill"
    assert final_weights(run_dir) == final_weights(clean)


def test_the_same_error_at_the_same_step_twice_ends_the_run_with_its_reason(
    start: Callable[..., Any],
) -> None:
    process, run_dir = start(inject={"raise_step": [[9, 0]]})
    await_that(lambda: events(run_dir, "fault"), process)
    shutil.rmtree(run_dir / "logs" / "injected")  # and so it comes again
    said = end(process, code=5)
    assert "RuntimeError: injected" in said
    assert "twice in a row at step 8" in said
    assert f"mpt resume {run_dir}" in said
    assert len(events(run_dir, "fault")) == 2
    assert len(events(run_dir, "gave_up")) == 1


def test_a_budget_that_is_used_up_ends_the_run_and_a_mistake_is_not_retried(
    start: Callable[..., Any], small: Small
) -> None:
    process, run_dir = start("launch.max_restarts=0", inject={"segv_step": [[3, 0]]})
    said = end(process, code=5)
    assert "SIGSEGV" in said
    assert "no restarts are left of launch.max_restarts 0" in said
    assert len(events(run_dir, "attempt_started")) == 1
    shutil.rmtree(run_dir)
    process, run_dir = start(inject={"no such fault": 1})
    said = end(process, code=2)
    assert "no such fault" in said
    assert not events(run_dir, "fault"), "a mistake is no fault"
    assert len(events(run_dir, "attempt_started")) == 1


def test_no_process_is_left_however_a_run_ends(start: Callable[..., Any], small: Small) -> None:
    process, run_dir = start("train.steps=100000")
    workers = await_that(lambda: pids(run_dir, 0), process)
    process.kill()
    process.wait()
    for worker in workers:
        await_that(partial(is_gone, worker), None)
    # And nothing has to be cleared up before the next launch.
    small.mpt(
        "train", small.recipe, "--run-dir", run_dir, "--nproc", "2", "train.steps=100", code=0
    )


def test_a_signal_to_one_rank_that_waits_for_another_saves_and_stops_both(
    start: Callable[..., Any],
    small: Small,
    clean: Path,  # noqa: F811
) -> None:
    process, run_dir = start("checkpoint.every_steps=1", inject={"slow_rank": 1, "slow_s": 0.4})
    workers = await_that(lambda: pids(run_dir, 0, 3), process)
    os.kill(workers[0], signal.SIGTERM)  # in a collective, nearly all of the time, or in a save
    end(process, code=75)
    (stopped,) = events(run_dir, "stopped")
    assert stopped["step"] in [e["step"] for e in events(run_dir, "checkpoint")]
    assert not events(run_dir, "fault")
    small.mpt("resume", run_dir)
    assert final_weights(run_dir) == final_weights(clean)
