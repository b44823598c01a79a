"""The steps that count, and what faults cost, against a plain simulation of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpt.ledger import Ledger, RolledBack
from mpt.lineage import account, breaches, lineage, positions
from mpt.log import read_lines

BATCH = 4
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
ENDS = ["fault", "early fault", "gave up", "stop", "silence", "roll back"]
LAWS = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass
class Simulated:
    """A run as it happened, and what it wrote down; time is whole seconds."""

    metrics: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    chain: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Of each step of the final lineage, the line that told of it."""
    ledger: list[RolledBack] = field(default_factory=list)
    attempt: int = -1
    step: int = 0
    now: int = 0
    lost: int = 0
    wall: int = 0
    idle: int = 0
    launches: int = 0
    cut: bool = False
    """The last line that was written has no end."""
    zombies: bool = False

    def event(self, kind: str, /, **fields: Any) -> None:
        self.events.append({"event": kind, **fields, "time": self.time()})

    def time(self) -> str:
        return (EPOCH + timedelta(seconds=self.now)).isoformat().replace("+00:00", "Z")

    def samples(self, step: int) -> int:
        """Position after a step, from the definition: passed-over data counts for no step."""
        position = 0
        for _ in range(step):
            position = Ledger(tuple(self.ledger)).position(position) + BATCH
        return position

    def spend(self, seconds: int) -> None:
        self.now += seconds
        self.wall += seconds

    def begin(self, at: int, *, launch: bool, wait: int = 1) -> None:
        """Start an attempt that goes on from a step."""
        if launch:
            self.launches += 1
            self.now += wait
            self.idle += wait if self.launches > 1 else 0
        else:
            self.spend(wait)
        self.attempt += 1
        self.event("attempt_started", attempt=self.attempt, nodes=["a"], pids=[1], world_size=1)
        self.spend(1)
        if at:
            self.event("resumed", attempt=self.attempt, step=at, samples=self.samples(at))
        self.event("warning", why="ready")
        self.lost += self.step - at
        anew, self.step = self.step > at == 0, at
        self.chain = {step: line for step, line in self.chain.items() if step <= at}
        if anew:  # only its steps tell that it did not resume
            self.take_step()

    def take_step(self, *, cut: bool = False) -> None:
        self.spend(2)
        self.step += 1
        self.chain[self.step] = self.write(self.step, self.attempt, cut=cut)

    def write(self, step: int, attempt: int, *, cut: bool = False) -> dict[str, Any]:
        """Write a line, and return it with whether it can be read; a cut one spoils the next."""
        line = {
            "step": step,
            "samples": self.samples(step),
            "loss": 1.0 / step,
            "step_s": 1.5,
            "applied": True,
            "attempt": attempt,
            "time": self.time(),
        }
        text = json.dumps(line)
        self.metrics.append(text[: len(text) // 2] if cut else text + "\n")
        spoiled, self.cut = self.cut or cut, cut
        return {**line, "spoiled": spoiled}

    def readable(self) -> list[dict[str, Any]]:
        lines = [self.chain[step] for step in sorted(self.chain)]
        return [
            {key: value for key, value in line.items() if key != "spoiled"}
            for line in lines
            if not line["spoiled"]
        ]


@st.composite
def runs(draw: st.DrawFn, *, torn: bool) -> Simulated:
    """Draw a run with faults, zombies, rollbacks, preemptions and deaths without a word."""
    run = Simulated()
    run.begin(0, launch=True)
    for _ in range(draw(st.integers(0, 6))):
        for _ in range(draw(st.integers(0, 5))):
            run.take_step(cut=torn and draw(st.integers(0, 9)) == 0)
        first = int(torn and run.step > 0)  # a torn log may not tell that a run began anew
        at = draw(st.integers(first, run.step))
        before, old = run.step, run.attempt
        match draw(st.sampled_from(ENDS)):
            case "fault":
                run.event("fault", attempt=old, kind="killed", step=run.step, detected_s=0.5)
                run.begin(at, launch=False, wait=draw(st.integers(0, 4)))
            case "early fault":  # the next attempt dies before it has resumed
                run.event("fault", attempt=old, kind="hang", step=run.step, detected_s=None)
                run.attempt += 1
                run.event("attempt_started", attempt=run.attempt, nodes=["a"])
                run.spend(3)
                run.event("fault", attempt=run.attempt, kind="failed", step=0, detected_s=0.1)
                run.begin(at, launch=False)
            case "gave up":
                run.event("fault", attempt=old, kind="failed", step=run.step, detected_s=0.5)
                run.event("gave_up", why="no restarts left")
                run.begin(at, launch=True, wait=draw(st.integers(1, 50)))
            case "stop":
                run.event("stopped", attempt=old, signal=15, step=run.step)
                run.begin(run.step, launch=True, wait=draw(st.integers(1, 50)))
            case "silence":
                run.begin(at, launch=True, wait=draw(st.integers(1, 50)))
            case "roll back" if run.step > first:
                to = draw(st.integers(first, run.step - 1))
                window = RolledBack(to, run.samples(to), run.samples(run.step), "spike")
                run.event("rollback", attempt=old, from_step=run.step, to_step=to)
                run.ledger.append(window)
                run.begin(to, launch=False)
        if before > run.step and draw(st.booleans()):
            # The group that was given up goes on for a while, unseen.
            run.zombies = True
            for step in range(before + 1, before + draw(st.integers(1, 3)) + 1):
                run.write(step, old)
    run.spend(1)
    run.event("warning", why="the last record")
    return run


def read_back(run: Simulated, directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    path.write_text("".join(run.metrics), encoding="utf-8")
    return list(read_lines(path))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@LAWS
@given(run=runs(torn=True))
def test_the_lineage_is_the_steps_that_the_weights_went_through(
    directory: Path, run: Simulated
) -> None:
    assert lineage(read_back(run, directory), run.events) == run.readable()


@LAWS
@given(run=runs(torn=False))
def test_a_lineage_is_one_pass_over_the_data_but_for_what_the_ledger_passes_over(
    directory: Path, run: Simulated
) -> None:
    lines = lineage(read_back(run, directory), run.events)
    spans = positions(lines, BATCH)
    ledger = Ledger(tuple(run.ledger))
    assert breaches(spans, ledger) == []
    seen = [position for span in spans for position in range(span.start, span.stop)]
    assert len(set(seen)) == len(seen) == run.step * BATCH
    assert seen == [p for p in range(run.samples(run.step)) if ledger.position(p) == p]


@LAWS
@given(run=runs(torn=False))
def test_the_account_is_what_the_faults_cost(directory: Path, run: Simulated) -> None:
    found = account(read_back(run, directory), run.events)
    if not run.zombies:
        assert found.lost_steps == run.lost
    assert found.lost_steps >= run.lost, "what is done in vain counts, whoever does it"
    assert (found.n_launches, found.n_attempts) == (run.launches, run.attempt + 1)
    assert found.wall_s == run.wall
    assert found.idle_s == run.idle
    assert found.productive_s == 1.5 * run.step
    assert found.goodput == round(1.5 * run.step / run.wall, 4)
    assert sum(found.faults.values()) == sum(e["event"] == "fault" for e in run.events)


def steps(attempt: int, first: int, last: int, second: int = 0) -> Iterator[dict[str, Any]]:
    for step in range(first, last + 1):
        time = (EPOCH + timedelta(seconds=second)).isoformat()
        yield {
            "step": step,
            "samples": step * BATCH,
            "loss": None,
            "step_s": 1.0,
            "attempt": attempt,
            "time": time,
        }


def started(attempt: int, second: int) -> dict[str, Any]:
    time = (EPOCH + timedelta(seconds=second)).isoformat()
    return {"event": "attempt_started", "attempt": attempt, "time": time}


def test_while_the_newest_attempt_loads_what_others_write_does_not_count() -> None:
    metrics = [*steps(0, 1, 6, second=5), *steps(0, 7, 9, second=20)]
    events = [started(0, 0), {"event": "checkpoint", "step": 7}, started(1, 10)]
    assert [line["step"] for line in lineage(metrics, events)] == [1, 2, 3, 4, 5, 6, 7]
    resumed = {"event": "resumed", "attempt": 1, "step": 6, "samples": 6 * BATCH}
    assert [line["step"] for line in lineage(metrics, [*events, resumed])] == [1, 2, 3, 4, 5, 6]


def test_a_step_that_only_the_fault_knows_of_is_lost_too() -> None:
    events = [
        started(0, 0),
        {"event": "fault", "attempt": 0, "kind": "killed", "step": 7, "detected_s": 0.2},
        started(1, 5),
        {"event": "resumed", "attempt": 1, "step": 4, "samples": 4 * BATCH},
    ]
    assert account(list(steps(0, 1, 6)), events).lost_steps == 3
    assert account([], events).lost_steps == 3


@pytest.mark.parametrize(
    ("samples", "wrong"),
    [
        ([4, 8, 12], []),
        ([4, 12, 16], ["step 2 begins at position 8; due was step 2 at 4"]),
        ([4, 4, 8], ["step 2 begins at position 0; due was step 2 at 4"]),
    ],
)
def test_a_skipped_or_repeated_sample_is_named(samples: list[int], wrong: list[str]) -> None:
    lines = [{"step": i + 1, "samples": stop} for i, stop in enumerate(samples)]
    assert breaches(positions(lines, BATCH), Ledger()) == wrong


@pytest.mark.parametrize("start", [4, 8])
def test_a_missing_step_is_named(start: int) -> None:
    lines = [{"step": 1, "samples": 4}, {"step": 3, "samples": start + BATCH}]
    (wrong,) = breaches(positions(lines, BATCH), Ledger())
    assert wrong == f"step 3 begins at position {start}; due was step 2 at 4"


def test_data_that_the_ledger_passes_over_must_be_passed_over() -> None:
    ledger = Ledger((RolledBack(1, 4, 12, "spike"),))
    good = [{"step": 1, "samples": 4}, {"step": 2, "samples": 16}]
    bad = [{"step": 1, "samples": 4}, {"step": 2, "samples": 8}]
    assert breaches(positions(good, BATCH), ledger) == []
    assert len(breaches(positions(bad, BATCH), ledger)) == 1


def test_steps_that_the_log_has_lost_are_not_won_back() -> None:
    events = [started(0, 0), started(1, 5), {"event": "resumed", "attempt": 1, "step": 8}]
    assert account(list(steps(0, 1, 6)), events).lost_steps == 0


def test_attempts_count_in_the_order_of_their_numbers_whoever_writes_first() -> None:
    resumed = {"event": "resumed", "attempt": 8, "step": 2}
    lines = lineage([*steps(8, 3, 5), *steps(1, 1, 4)], [resumed])
    assert [(line["attempt"], line["step"]) for line in lines] == [
        *((1, step) for step in (1, 2)),
        *((8, step) for step in (3, 4, 5)),
    ]


def test_an_attempt_says_nothing_of_steps_before_its_beginning() -> None:
    resumed = {"event": "resumed", "attempt": 1, "step": 4}
    lines = lineage([*steps(0, 1, 4), *steps(1, 3, 6)], [resumed])
    assert [line["attempt"] for line in lines] == [0, 0, 0, 0, 1, 1]


def test_launches_at_one_instant_take_no_time() -> None:
    events = [{**started(0, 0), "event": "warning", "attempt": None}, started(0, 1), started(1, 1)]
    found = account([], events)
    assert (found.n_launches, found.wall_s, found.idle_s, found.goodput) == (2, 0.0, 0.0, None)


def test_an_evaluation_is_not_a_step() -> None:
    (line,) = steps(0, 1, 1)
    evaluation = {**line, "eval_loss": 2.0}
    del evaluation["loss"]
    assert lineage([line, evaluation], []) == [line]


COUNTS = st.one_of(st.integers(0, 9), st.sampled_from([None, True, -1, 2.5, "3", [4]]))
SECONDS = st.one_of(st.floats(), st.sampled_from([None, "2", 10**400]))
TIMES = st.one_of(
    st.integers(0, 60).map(lambda s: (EPOCH + timedelta(seconds=s)).isoformat()),
    st.sampled_from([None, 7, "9999", "0001-01-01T00:00:00", "yesterday"]),
)
KINDS = ["attempt_started", "resumed", "fault", "recovered", "rollback", "stopped", "checkpoint"]
RECORD = st.fixed_dictionaries(
    {"attempt": COUNTS, "step": COUNTS, "samples": COUNTS, "time": TIMES},
    optional={
        "loss": SECONDS,
        "step_s": SECONDS,
        "detected_s": SECONDS,
        "restart_s": SECONDS,
        "kind": COUNTS,
        "event": st.sampled_from(KINDS),
    },
)


@LAWS
@given(records=st.lists(RECORD, max_size=20))
def test_a_damaged_log_is_read_without_an_error(records: list[dict[str, Any]]) -> None:
    found = asdict(account(records, records))
    json.dumps(found, allow_nan=False)
    assert found["wall_s"] >= 0
    assert found["idle_s"] >= 0
    taken = [line["step"] for line in lineage(records, records)]
    assert taken == sorted(set(taken))
