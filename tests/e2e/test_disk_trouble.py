"""Disks that are full, read-only or gone: training goes on, and says so."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpt.checkpoint.layout import committed, newest_sound, step_of
from mpt.rundir import EVENTS, METRICS
from tests.disks import fill_up, make_read_only, small_disk
from tests.e2e.conftest import Small, await_that, lines

LONG = ("train.steps=100", "eval.every_steps=1000", "train.log_every_steps=50")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose checkpoints lie on a disk of their own."""
    with small_disk(tmp_path / "run" / "checkpoints", kib=8 * 1024):
        yield tmp_path / "run"


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir / EVENTS) if event["event"] == kind]


def test_a_disk_that_is_read_only_for_a_while_costs_only_the_saves_of_that_time(
    small: Small, run_dir: Path, children: list[subprocess.Popen[str]]
) -> None:
    disk = run_dir / "checkpoints"
    process = small.start("train", small.recipe, "--run-dir", run_dir, *LONG)
    children.append(process)
    await_that(lambda: events(run_dir, "checkpoint"), process)
    await_that(lambda: make_read_only(disk), process)  # not while a file is being written
    await_that(lambda: events(run_dir, "checkpoint_failed"), process)
    directory, passed_over = newest_sound(run_dir)
    assert not passed_over
    assert make_read_only(disk, read_only=False)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    failed = events(run_dir, "checkpoint_failed")[0]
    assert failed["step"] > step_of(directory)
    assert "Read-only file system" in failed["why"]
    assert f"the save of step {failed['step']} failed" in said
    assert f"last good checkpoint: step {step_of(directory)}" in said
    assert step_of(newest_sound(run_dir)[0]) == 100
    steps = [record["step"] for record in lines(run_dir / METRICS) if "loss" in record]
    assert steps == list(range(1, 101)), "no step was taken twice: nothing was restarted"


def test_a_run_whose_last_save_fails_says_so_and_keeps_the_one_before(
    small: Small, run_dir: Path, children: list[subprocess.Popen[str]]
) -> None:
    process = small.start("train", small.recipe, "--run-dir", run_dir, *LONG)
    children.append(process)
    await_that(lambda: events(run_dir, "checkpoint"), process)
    fill_up(run_dir / "checkpoints")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 4, said
    assert "the save of step 100 failed" in said
    assert "No space left on device" in said
    assert step_of(newest_sound(run_dir)[0]) < 100
    (run_dir / "checkpoints" / "filler").unlink()
    small.mpt("resume", run_dir)
    assert step_of(newest_sound(run_dir)[0]) == 100


def test_logs_on_a_full_disk_do_not_stop_a_run(small: Small, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with small_disk(run_dir / "logs", kib=64) as disk:
        for name in (METRICS, EVENTS):
            (disk / name).touch()
            (run_dir / name).symlink_to(disk / name)
        fill_up(disk)
        said = small.mpt("train", small.recipe, "--run-dir", run_dir, "--nproc", "2").stderr
        assert said.count("No space left on device") == 2, "the supervisor says it, and rank 0"
        assert not (run_dir / METRICS).read_text()
        assert not any(path.stat().st_size for path in disk.rglob("rank-*.log"))
    assert step_of(newest_sound(run_dir)[0]) == 20


def test_logs_that_are_deleted_do_not_stop_a_run(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    run_dir = tmp_path / "run"
    process = small.start("train", small.recipe, "--run-dir", run_dir, "--nproc", "2", *LONG)
    children.append(process)
    await_that(lambda: lines(run_dir / METRICS), process)
    shutil.rmtree(run_dir / "logs")
    (run_dir / METRICS).unlink()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert lines(run_dir / METRICS)[-1]["step"] == 100, "it is written anew"
    assert step_of(committed(run_dir / "checkpoints")[0]) == 100


def test_a_terminal_that_cannot_be_written_to_does_not_stop_a_run(
    small: Small, tmp_path: Path
) -> None:
    command = small.command("train", small.recipe, "--run-dir", tmp_path / "run")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=full, cwd=small.root, timeout=120)
    assert done.returncode == 0
