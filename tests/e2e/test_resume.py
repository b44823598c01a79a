"""A run that is stopped, killed or moved to another world size ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from mpt.checkpoint.layout import step_directory
from mpt.checkpoint.weights import open_weights
from tests.e2e.conftest import Small, await_that, lines
from tests.tiny_model import digest

STEPS = 20
LOSS_TOLERANCE = 1e-4


def final_weights(run_dir: Path, step: int = STEPS) -> str:
    weights = open_weights(step_directory(run_dir / "checkpoints", step))
    return digest({name: weights.read(name) for name in weights.shapes})


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of each step; of a step taken twice, the last."""
    return {r["step"]: r["loss"] for r in lines(run_dir / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def clean(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on two ranks that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    small.mpt("train", small.recipe, "--run-dir", run_dir, "--nproc", "2")
    return run_dir


@pytest.fixture(scope="module")
def half(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first ten of them."""
    run_dir = tmp_path_factory.mktemp("half") / "run"
    small.mpt("train", small.recipe, "train.steps=10", "--run-dir", run_dir, "--nproc", "2")
    return run_dir


def test_ten_steps_resume_and_ten_more_equal_twenty_bit_for_bit(
    small: Small, clean: Path, half: Path
) -> None:
    small.mpt("resume", half, "train.steps=20")
    assert final_weights(half) == final_weights(clean)
    assert losses(half) == losses(clean)
    resumed = [e for e in lines(half / "events.jsonl") if e["event"] == "resumed"]
    assert [(e["step"], e["samples"]) for e in resumed] == [(10, 60)]


@pytest.mark.parametrize("nproc", [1, 3])
def test_at_another_world_size_the_same_samples_come_in_the_same_steps(
    small: Small, clean: Path, tmp_path: Path, nproc: int
) -> None:
    small.mpt(
        "train", small.recipe, "train.steps=10", "--run-dir", tmp_path / "run", "--nproc", "2"
    )
    small.mpt("resume", tmp_path / "run", "train.steps=20", "--nproc", str(nproc))
    ours, theirs = losses(tmp_path / "run"), losses(clean)
    assert sorted(ours) == list(range(1, STEPS + 1))
    # A loss is a fingerprint of its samples: with others it would differ in the first digit.
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=LOSS_TOLERANCE), step


def test_five_kills_in_a_row_change_no_bit(
    small: Small, clean: Path, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    run_dir = tmp_path / "run"
    arguments: list[str | Path] = ["train", small.recipe, "--run-dir", run_dir, "--nproc", "2"]
    process = small.start(*arguments, "checkpoint.every_steps=2")
    children.append(process)
    for kill in range(5):

        def started(kill: int = kill) -> list[int]:
            """The pids of attempt number `kill`, once it has taken a step."""
            events = lines(run_dir / "events.jsonl")
            attempts = [e for e in events if e["event"] == "attempt_started"]
            if len(attempts) <= kill:
                return []
            steps = [r for r in lines(run_dir / "metrics.jsonl") if "loss" in r]
            fresh = [r for r in steps if r["time"] > attempts[kill]["time"]]
            pids: list[int] = attempts[kill]["pids"]
            return pids if fresh else []

        pids = await_that(started, process)
        os.kill(pids[kill % 2], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    events = lines(run_dir / "events.jsonl")
    assert [e["event"] for e in events].count("fault") == 5, said
    assert "was killed by SIGKILL" in said
    assert final_weights(run_dir) == final_weights(clean)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_saves_and_a_resume_ends_as_if_it_had_not_been(
    small: Small,
    clean: Path,
    tmp_path: Path,
    children: list[subprocess.Popen[str]],
    number: signal.Signals,
    code: int,
) -> None:
    run_dir = tmp_path / "run"
    arguments: list[str | Path] = ["train", small.recipe, "--run-dir", run_dir, "--nproc", "2"]
    process = small.start(*arguments, "checkpoint.every_steps=1000")
    children.append(process)
    await_that(lambda: (run_dir / "metrics.jsonl").exists(), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    stopped = [e for e in lines(run_dir / "events.jsonl") if e["event"] == "stopped"]
    assert len(stopped) == 1
    assert 0 < stopped[0]["step"] < STEPS, "too late to have interrupted anything"
    small.mpt("resume", run_dir)
    assert final_weights(run_dir) == final_weights(clean)


def test_the_same_train_command_goes_on_and_is_idempotent(small: Small, half: Path) -> None:
    before = final_weights(half, 10)
    arguments: list[str | Path] = ["train", small.recipe, "--run-dir", half, "--nproc", "2"]
    small.mpt(*arguments, "train.steps=20")
    small.mpt(*arguments, "train.steps=20")
    assert final_weights(half, 10) == before
    started = [e for e in lines(half / "events.jsonl") if e["event"] == "attempt_started"]
    assert [e["attempt"] for e in started] == list(range(len(started)))


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    small: Small, clean: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    small.mpt("train", small.recipe, "train.steps=10", "--run-dir", run_dir, "--nproc", "2")
    newest = step_directory(run_dir / "checkpoints", 10)
    file = next(newest.glob("weights-00002*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    small.mpt("verify", run_dir, code=4)
    done = small.mpt("resume", run_dir, "train.steps=20")
    assert "step-00000010 is damaged: weights-00002-of-00002.safetensors" in done.stderr
    assert final_weights(run_dir) == final_weights(clean)
    assert "sound" in small.mpt("verify", run_dir).stdout
