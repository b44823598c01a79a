"""A rank that dies costs no step that was finished: the others' memory and its own outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from mpt.checkpoint.layout import committed, step_directory
from mpt.checkpoint.weights import open_weights
from mpt.rundir import EVENTS, METRICS
from tests.e2e.conftest import Small, await_that, lines
from tests.tiny_model import digest

STEPS = 40


def final_weights(run_dir: Path) -> str:
    weights = open_weights(step_directory(run_dir / "checkpoints", STEPS))
    return digest({name: weights.read(name) for name in weights.shapes})


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir / EVENTS) if event["event"] == kind]


def test_killed_ranks_go_on_from_memory_and_change_no_bit(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    clean, run_dir = tmp_path / "clean", tmp_path / "run"
    arguments = ["--nproc", "2", f"train.steps={STEPS}", "checkpoint.every_steps=1000"]
    small.mpt("train", small.recipe, "--run-dir", clean, *arguments)
    arguments.append("checkpoint.memory_every_steps=1")
    process = small.start("train", small.recipe, "--run-dir", run_dir, *arguments)
    children.append(process)
    for victim in (0, 1):
        n_seen = len(lines(run_dir / METRICS))
        await_that(partial(n_metrics_above, run_dir, n_seen + 5), process)
        started = events(run_dir, "attempt_started")[victim]
        os.kill(started["pids"][victim], signal.SIGKILL)
        resumed = await_that(partial(resumed_for_the, victim, run_dir), process)
        finished = [r["step"] for r in lines(run_dir / METRICS) if r["attempt"] == victim][-1]
        assert resumed["source"] == "memory"
        assert resumed["step"] >= finished - 1, "that of the last step may have been cut off"
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "resumed from memory at step" in said
    assert [path.name for path in committed(run_dir / "checkpoints")] == [f"step-{STEPS:08d}"]
    assert final_weights(run_dir) == final_weights(clean)


def n_metrics_above(run_dir: Path, count: int) -> bool:
    return len(lines(run_dir / METRICS)) > count


def resumed_for_the(nth: int, run_dir: Path) -> dict[str, Any] | None:
    return next(iter(events(run_dir, "resumed")[nth:]), None)
