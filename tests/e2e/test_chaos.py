"""`mpt chaos`: faults on purpose, the weights of a run without them, and a report that tells."""

from __future__ import annotations

import json
from pathlib import Path

from mpt.chaos.plan import KINDS, plan
from mpt.chaos.report import rows
from mpt.chaos.storm import Struck
from tests.e2e.conftest import Small

FAULTS = 6


def test_a_run_under_faults_ends_with_the_weights_of_one_without(
    small: Small, tmp_path: Path
) -> None:
    kinds = "rank kill,leader kill,preemption,torn save,corrupt checkpoint,nan"
    settings = ["train.steps=240", "eval.every_steps=1000", "checkpoint.every_steps=12"]
    where = ["--faults", str(FAULTS), "--kinds", kinds, "--dir", str(tmp_path / "chaos")]
    done = small.mpt("chaos", small.recipe, *settings, *where, "--json")
    found = json.loads(done.stdout)
    assert found["held"]
    assert found["identical"]
    assert found["breaches"] == []
    assert sorted(row["fault"] for row in found["rows"]) == sorted(kinds.split(","))
    assert all(row["recovered_s"] > 0 for row in found["rows"])
    assert 0 < found["goodput"] < 1
    again = small.mpt("chaos", small.recipe, *settings, *where, code=2)
    assert "--overwrite" in again.stderr


def test_a_directory_that_chaos_did_not_make_is_never_deleted(small: Small, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    refused = small.mpt("chaos", small.recipe, "--dir", precious, "--overwrite", code=2)
    assert "not made by mpt chaos" in refused.stderr
    assert (precious / "thesis.tex").exists()


def test_a_plan_is_a_function_of_the_seed_and_has_room_for_each_fault() -> None:
    planned = plan(KINDS, 20, steps=1000, seed=3)
    assert planned == plan(KINDS, 20, steps=1000, seed=3)
    assert planned != plan(KINDS, 20, steps=1000, seed=4)
    assert {fault.kind for fault in planned} == set(KINDS)
    steps = [fault.step for fault in planned]
    assert steps == sorted(set(steps))
    assert steps[0] >= 100
    assert steps[-1] < 900


def test_a_fault_that_nothing_followed_is_not_called_survived() -> None:
    struck = Struck("rank kill", 5, 1000.0, 0, "rank 1")
    at = "1970-01-01T00:16:4{}.000Z".format
    before = {"step": 5, "loss": 1.0, "attempt": 0, "time": at(0)}
    event = {"event": "fault", "attempt": 0, "time": at(2)}
    (row,) = rows([struck], [before], [event])
    assert (row.survived, row.detected_s) == (False, 2.0)
    after = {"step": 4, "loss": 1.0, "attempt": 1, "time": at(7)}
    resumed = {"event": "resumed", "attempt": 1, "step": 3, "source": "memory", "time": at(6)}
    (row,) = rows([struck], [before, after], [event, resumed])
    assert (row.survived, row.recovered_s, row.recomputed) == (True, 7.0, 2)
    assert row.resumed_from == "memory"
