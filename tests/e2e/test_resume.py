"""A run that is stopped, killed or moved to another world size ends as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
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


@pytest.fixture
def half(clean: Path, tmp_path: Path) -> Path:
    """The same run as it was when step ten had just been saved."""
    run_dir = tmp_path / "half"
    shutil.copytree(clean, run_dir)
    for step in (15, 20):
        shutil.rmtree(step_directory(run_dir / "checkpoints", step))
    for name in ("metrics.jsonl", "events.jsonl"):
        records = [line for line in lines(run_dir / name) if line.get("step", 0) <= 10]
        (run_dir / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir


def resumed_at(run_dir: Path) -> list[tuple[int, int]]:
    """Step and sample position of each resume."""
    events = lines(run_dir / "events.jsonl")
    return [(e["step"], e["samples"]) for e in events if e["event"] == "resumed"]


def test_ten_steps_resume_and_ten_more_equal_twenty_bit_for_bit(
    small: Small, clean: Path, half: Path
) -> None:
    small.mpt("resume", half)
    assert final_weights(half) == final_weights(clean)
    assert losses(half) == losses(clean)
    assert resumed_at(half) == [(10, 60)]


@pytest.fixture(scope="module")
def undropped(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean run without dropout, whose masks belong to ranks."""
    run_dir = tmp_path_factory.mktemp("undropped") / "run"
    arguments = ["model.resid_pdrop=0.0", "--run-dir", str(run_dir), "--nproc", "2"]
    small.mpt("train", small.recipe, *arguments)
    return run_dir


@pytest.mark.parametrize("nproc", [1, 3])
def test_at_another_world_size_the_same_samples_come_in_the_same_steps(
    small: Small, undropped: Path, tmp_path: Path, nproc: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undropped, run_dir)
    for step in (15, 20):
        shutil.rmtree(step_directory(run_dir / "checkpoints", step))
    small.mpt("resume", run_dir, "--nproc", str(nproc))
    assert resumed_at(run_dir) == [(10, 60)]
    ours, theirs = losses(run_dir), losses(undropped)
    assert sorted(ours) == list(range(1, STEPS + 1))
    # A loss is a fingerprint of its samples: with others it would differ in the first digit.
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=LOSS_TOLERANCE), step


def test_a_survivor_that_cannot_hear_does_not_hold_up_the_repair(
    small: Small, clean: Path, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    run_dir = tmp_path / "run"
    process = started(small, run_dir, "checkpoint.every_steps=1")
    children.append(process)
    await_that(lambda: (run_dir / "metrics.jsonl").exists(), process)
    survivor, victim = lines(run_dir / "events.jsonl")[0]["pids"]
    os.kill(survivor, signal.SIGSTOP)  # as deaf as a rank inside a collective
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    (fault,) = [e for e in lines(run_dir / "events.jsonl") if e["event"] == "fault"]
    assert (fault["kind"], fault["rank"]) == ("killed", 1)
    assert final_weights(run_dir) == final_weights(clean)


def started(small: Small, run_dir: Path, *changes: str) -> subprocess.Popen[str]:
    """Start a run and return once its two workers listen to signals: then they open their logs."""
    process = small.start("train", small.recipe, "--run-dir", run_dir, "--nproc", "2", *changes)
    logs = run_dir / "logs" / "attempt-0"
    await_that(lambda: len(list(logs.glob("rank-?.log"))) == 2, process)
    return process


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
    process = started(small, run_dir, "checkpoint.every_steps=1000")
    children.append(process)
    await_that(lambda: (run_dir / "metrics.jsonl").exists(), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert f"mpt resume {run_dir}" in said
    events = lines(run_dir / "events.jsonl")
    (step,) = [e["step"] for e in events if e["event"] == "stopped"]
    assert 0 < step < STEPS, "too late to have interrupted anything"
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [step]
    small.mpt("resume", run_dir)
    assert [at for at, _ in resumed_at(run_dir)] == [step]
    assert final_weights(run_dir) == final_weights(clean)


def test_a_signal_while_workers_start_ends_them_and_loses_nothing(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    process = started(small, tmp_path / "run")
    children.append(process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_second_interrupt_does_not_wait_for_workers_that_do_not_end(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    run_dir = tmp_path / "run"
    process = started(small, run_dir, "train.steps=100000")
    children.append(process)
    await_that(lambda: (run_dir / "metrics.jsonl").exists(), process)
    for pid in lines(run_dir / "events.jsonl")[0]["pids"]:
        os.kill(pid, signal.SIGSTOP)  # as if the step took for ever
    process.send_signal(signal.SIGINT)
    events = run_dir / "events.jsonl"
    await_that(lambda: any(e["event"] == "stopping" for e in lines(events)), process)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_the_same_train_command_goes_on_and_is_idempotent(
    small: Small, clean: Path, half: Path
) -> None:
    for _ in range(2):
        small.mpt("train", small.recipe, "--run-dir", half, "--nproc", "2")
        assert final_weights(half) == final_weights(clean)
    attempts = [e for e in lines(half / "events.jsonl") if e["event"] == "attempt_started"]
    assert [e["attempt"] for e in attempts] == [0, 1, 2]


def test_damaged_checkpoints_are_passed_over_and_every_rank_says_what_it_found(
    small: Small, clean: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(clean, run_dir)
    for step, name in ((20, "weights-00001-of-00002"), (15, "weights-00002-of-00002")):
        file = step_directory(run_dir / "checkpoints", step) / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    small.mpt("verify", run_dir, code=4)
    said = small.mpt("resume", run_dir).stderr
    assert "step-00000020 is damaged: weights-00001-of-00002.safetensors" in said
    assert "step-00000015 is damaged: weights-00002-of-00002.safetensors" in said
    assert "resumed from the checkpoint of step 10" in said
    assert final_weights(run_dir) == final_weights(clean)
    assert "sound" in small.mpt("verify", run_dir).stdout


def test_other_data_is_refused_and_the_same_data_elsewhere_is_not(
    small: Small, half: Path, tmp_path: Path
) -> None:
    for name in ("train", "eval"):
        shutil.copytree(small.root / name, tmp_path / name)
    moved = ["prepare=null", f"data.streams.stdlib.path={tmp_path / 'train'}"]
    small.mpt("resume", half, *moved)
    swapped = ["prepare=null", f"data.streams.stdlib.path={tmp_path / 'eval'}", "data.eval=null"]
    refused = small.mpt("resume", half, *swapped, code=3).stderr
    assert "was started with other content of stdlib" in refused


def test_a_reader_that_goes_away_does_not_end_the_run(
    small: Small, clean: Path, half: Path, children: list[subprocess.Popen[str]]
) -> None:
    process = small.start("train", small.recipe, "--run-dir", half, "--nproc", "2")
    children.append(process)
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    process.stderr = None
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert final_weights(half) == final_weights(clean)
