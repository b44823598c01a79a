"""Bad steps, rollbacks and a stop while evaluating, as a user meets them: through `mpt train`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mpt.launch.pulse import Phase, Pulse
from mpt.ledger import Ledger, RolledBack, Skipped, read_ledger
from mpt.lineage import breaches, lineage, positions
from tests.e2e.conftest import Small, await_that, lines
from tests.e2e.test_resume import final_weights, losses

SAMPLES = 6
HEALTH = ("health.spike_window=4", "health.max_skipped_in_a_row=3")


def inject(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> None:
    """Have the runs of this test meet faults."""
    monkeypatch.setenv("MPT_INJECT", json.dumps(faults))


def ledger_of(run_dir: Path) -> Ledger:
    return Ledger.read(read_ledger(run_dir), run_dir / "ledger.jsonl", SAMPLES)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir / "events.jsonl") if event["event"] == kind]


def test_a_run_goes_back_passes_over_the_data_and_a_replay_of_its_ledger_ends_alike(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    inject(monkeypatch, nan_steps=[3, 12, 13, 14], spike_steps=[18])
    train = ["train", str(small.recipe), "--nproc", "2", *HEALTH, "--run-dir"]
    small.mpt(*train, run_dir)
    ledger = ledger_of(run_dir)
    assert ledger.n_rollbacks == 1
    assert [(e.start, e.stop) for e in ledger.entries if isinstance(e, RolledBack)] == [(66, 84)]
    skipped = [e.step for e in ledger.entries if isinstance(e, Skipped)]
    assert skipped == [3, 12, 13, 14, 18]
    (back,) = events(run_dir, "rollback")
    assert (back["from_step"], back["to_step"], back["positions"]) == (14, 10, [66, 84])
    assert not events(run_dir, "fault"), "to go back is none"

    steps = lineage(lines(run_dir / "metrics.jsonl"), lines(run_dir / "events.jsonl"))
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert [line["step"] for line in steps if not line["applied"]] == [3, 18]
    assert breaches(positions(steps, SAMPLES), ledger) == []

    monkeypatch.delenv("MPT_INJECT")
    copy.mkdir()
    (copy / "ledger.jsonl").write_bytes(read_ledger(run_dir))
    small.mpt(*train, copy)
    assert final_weights(copy) == final_weights(run_dir)
    assert {step: loss for step, loss in losses(copy).items() if loss is not None} == {
        line["step"]: line["loss"] for line in steps if line["applied"]
    }


def test_a_run_whose_rollbacks_are_used_up_ends_as_diverged_and_says_where(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    inject(monkeypatch, nan_steps=[4, 5, 6, 8, 9, 10])
    train = ["train", str(small.recipe), "--nproc", "2", *HEALTH, "health.max_rollbacks=1"]
    said = small.mpt(*train, "--run-dir", run_dir, code=6).stderr
    assert "steps 8 to 10 were skipped in a row" in said
    assert f"mpt resume {run_dir} health.max_rollbacks=4" in said
    assert [e["step"] for e in events(run_dir, "diverged")] == [10]
    assert ledger_of(run_dir).n_rollbacks == 1


def test_a_rank_told_to_stop_while_it_evaluates_saves_and_the_evaluation_is_made_up(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    # More to evaluate on: time to be stopped in.
    shutil.copytree(small.root / "train", tmp_path / "eval")
    longer = ["prepare=null", f"data.eval.path={tmp_path / 'eval'}", "eval.samples=null"]
    run_dir = tmp_path / "run"
    process = small.start("train", small.recipe, "--nproc", "2", *longer, "--run-dir", run_dir)
    children.append(process)
    (attempt,) = await_that(lambda: events(run_dir, "attempt_started"), process)
    pid = attempt["pids"][1]
    pulse = pulse_of(pid, process)
    await_that(lambda: pulse.read().phase == Phase.EVALUATE, process)
    os.kill(pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    (stopped,) = events(run_dir, "stopped")
    assert stopped["step"] == 10
    assert evaluated(run_dir) == [], "it was not stopped in time"
    small.mpt("resume", run_dir)
    assert evaluated(run_dir) == [10, 20]
    assert [event["step"] for event in events(run_dir, "resumed")] == [10]


def evaluated(run_dir: Path) -> list[int]:
    return [line["step"] for line in lines(run_dir / "metrics.jsonl") if "eval_loss" in line]


def pulse_of(pid: int, process: subprocess.Popen[str]) -> Pulse:
    """Return the pulse of a rank, found among the files that it has open."""

    def found() -> list[Path]:
        open_files = Path(f"/proc/{pid}/fd").iterdir()
        return [path for path in open_files if "mpt-pulse" in os.readlink(path)]

    return Pulse(os.open(await_that(found, process)[0], os.O_RDWR))
