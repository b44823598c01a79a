"""`mpt status`: what the raw log adds up to, as JSON and for a person."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mpt.lineage import account
from mpt.recipe import freeze, load
from tests.cli.test_cli import TINY, mpt

BATCH = load(TINY).train.global_batch_size


def at(second: int, record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "time": f"2026-01-01T00:00:{second:02}.000Z"}


def step(second: int, number: int, attempt: int, skip: int = 0) -> dict[str, Any]:
    line = {
        "step": number,
        "samples": number * BATCH + skip,
        "tokens": number * 100,
        "loss": 5.0 - number,
        "step_s": 1.0,
        "attempt": attempt,
    }
    return at(second, line)


EVENTS = [
    at(0, {"event": "attempt_started", "attempt": 0, "nodes": ["n0", "n1"], "pids": [7, 8]}),
    at(3, {"event": "checkpoint", "step": 2}),
    at(
        6,
        {
            "event": "fault",
            "attempt": 0,
            "kind": "node_lost",
            "step": 4,
            "detected_s": 4.25,
            "why": "node n1 is lost",
        },
    ),
    at(7, {"event": "attempt_started", "attempt": 1, "nodes": ["n0", "n2"], "pids": [9, 10]}),
    at(8, {"event": "resumed", "attempt": 1, "step": 2, "samples": 2 * BATCH, "source": "disk"}),
    at(9, {"event": "recovered", "attempt": 1, "step": 3, "restart_s": 3.5}),
]
METRICS = [
    *(step(i, i, 0) for i in (1, 2, 3, 4)),
    step(9, 3, 1),
    at(9, {"step": 3, "eval_loss": 2.5}),
    step(4, 5, 0),  # of the group that was given up
    step(10, 4, 1),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    freeze(load(TINY), tmp_path / "recipe.yaml")
    fill(tmp_path, METRICS, EVENTS)
    return tmp_path


def fill(run_dir: Path, metrics: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    for name, records in (("metrics", metrics), ("events", events)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (run_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")


def status(run_dir: Path) -> dict[str, Any]:
    code, out, err = mpt("status", run_dir, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_account_in_json_is_recomputed_from_the_raw_log(run_dir: Path) -> None:
    found = status(run_dir)
    assert found["account"] == asdict(account(METRICS, EVENTS))
    assert found["account"]["faults"] == {"node_lost": 1}
    assert found["account"]["detected_s_max"] == 4.25
    assert found["account"]["restart_s_max"] == 3.5
    assert found["account"]["lost_steps"] == 3  # 3, 4 and the 5 of those who did not know
    assert found["account"]["wall_s"] == 10.0
    assert found["account"]["goodput"] == 0.4
    assert found["faults"] == 1
    assert found["nodes"] == ["n0", "n2"]
    assert found["breaches"] == []


def test_step_and_loss_are_those_of_the_final_lineage(run_dir: Path) -> None:
    found = status(run_dir)
    assert (found["step"], found["loss"], found["eval_loss"]) == (4, 1.0, 2.5)
    resumed = at(12, {"event": "resumed", "attempt": 2, "step": 2, "samples": 2 * BATCH})
    fill(run_dir, METRICS, [*EVENTS, resumed])
    assert status(run_dir)["step"] == 2


def test_a_person_sees_what_faults_cost(run_dir: Path) -> None:
    code, out, _ = mpt("status", run_dir)
    assert code == 0
    assert "1 node_lost; found within 4.2 s; training again within 3.5 s; 3 steps" in out
    assert "40.0% of 0:00:10, 2 attempts in 1 start" in out
    assert "n0, n2" in out
    assert "not one pass" not in out


def test_samples_that_were_left_out_are_shown_unless_the_ledger_says_so(run_dir: Path) -> None:
    metrics = [step(1, 1, 0), step(2, 2, 0, skip=BATCH)]
    fill(run_dir, metrics, EVENTS[:1])
    due = f"step 2 begins at position {2 * BATCH}; due was step 2 at {BATCH}"
    assert status(run_dir)["breaches"] == [due]
    assert f"not one pass over the data: {due}" in mpt("status", run_dir)[1]
    line = {"kind": "rolled_back", "to_step": 1, "from": BATCH, "to": 2 * BATCH, "why": "spike"}
    (run_dir / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    assert status(run_dir)["breaches"] == []


@pytest.mark.parametrize(
    ("last", "state"),
    [("finished", "finished"), ("stopped", "stopped"), ("gave_up", "stopped"), (None, "stopped")],
)
def test_the_last_milestone_says_how_a_run_stands(
    run_dir: Path, last: str | None, state: str
) -> None:
    ends = [] if last is None else [at(20, {"event": last, "attempt": 1})]
    fill(run_dir, METRICS, [*EVENTS, *ends, at(21, {"event": "straggler", "rank": 1})])
    assert status(run_dir)["state"] == state


def test_a_run_that_has_not_begun_has_a_status(run_dir: Path) -> None:
    fill(run_dir, [], [])
    found = status(run_dir)
    assert (found["step"], found["nodes"], found["account"]["goodput"]) == (0, [], None)
    assert mpt("status", run_dir)[0] == 0
