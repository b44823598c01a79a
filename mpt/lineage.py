"""What a run's raw log adds up to: the steps that count, the data they saw, what faults cost."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from math import inf
from typing import Any

from mpt.ledger import Ledger

Record = Mapping[str, Any]
"""A line of metrics.jsonl or events.jsonl."""

_LONGEST_S = 1e9
"""Thirty years: a time longer than this is damage."""


def lineage(metrics: Iterable[Record], events: Sequence[Record]) -> list[Record]:
    """Return the one line of each step that the run's weights went through, in order.

    An attempt that resumed at step s takes the place of all that earlier attempts did after s; one
    that took steps and did not resume began at 0. What an earlier attempt writes later on, because
    nobody has told it that it was given up, is left out for the same reason: only the numbers of
    attempts count, so clocks that differ between nodes do no harm. While the newest attempt has
    neither resumed nor stepped, what others write after its start is left out too, as far as it
    goes beyond the newest checkpoint.
    """
    return _follow(metrics, events).lines


@dataclass(frozen=True)
class Span:
    """The samples of one step."""

    step: int
    start: int
    """Position of the first."""
    stop: int
    """One after the last."""


def positions(lines: Iterable[Record], global_batch_size: int) -> list[Span]:
    """Return which samples each line of a lineage consumed."""
    return [
        Span(line["step"], line["samples"] - global_batch_size, line["samples"]) for line in lines
    ]


def breaches(spans: Iterable[Span], ledger: Ledger) -> list[str]:
    """Return where a lineage is not one pass over the data, a sentence each; none is the promise.

    One pass means that each step begins where the one before ended, or after the data that the
    ledger says is passed over, and that no step is missing.
    """
    found, step, position = [], 0, 0
    for span in spans:
        due = ledger.position(position)
        if (span.step, span.start) != (step + 1, due):
            found.append(
                f"step {span.step} begins at position {span.start}; "
                f"due was step {step + 1} at {due}"
            )
        step, position = span.step, span.stop
    return found


@dataclass(frozen=True, kw_only=True)
class Account:
    """What the faults of a run cost, over all its launches.

    Goodput is `productive_s / wall_s`: the seconds of the steps that are in the final lineage, by
    the seconds from the start of each launch's first attempt to the last record of that launch.
    Time between launches, as in a queue, is `idle_s` and not in `wall_s`. A launch goes on over
    faults and rollbacks; one that ended without a word ended with its last record.
    """

    n_launches: int
    n_attempts: int
    faults: dict[str, int]
    """How many there were of each kind: killed, failed, hang, node_lost."""
    detected_s_mean: float | None
    """From the last sign of life to the detection; None if no fault tells."""
    detected_s_max: float | None
    restart_s_mean: float | None
    """From the fault to the first finished step after it; None if there was none."""
    restart_s_max: float | None
    lost_steps: int
    """Finished steps that had to be taken again, or were given up by a rollback."""
    n_rollbacks: int
    n_skipped: int
    """Updates that were left out."""
    wall_s: float
    idle_s: float
    productive_s: float
    goodput: float | None
    """0 to 1; None before the first record."""


def account(metrics: Sequence[Record], events: Sequence[Record]) -> Account:
    """Return what a run's faults cost, from its raw log and nothing else."""
    followed = _follow(metrics, events)
    kinds = Counter(str(event.get("event")) for event in events)
    faults = [event for event in events if event.get("event") == "fault"]
    detected = _seconds(faults, "detected_s")
    restarted = _seconds([e for e in events if e.get("event") == "recovered"], "restart_s")
    starts = _launches(events)
    wall_s, idle_s = _wall(starts, (*metrics, *events))
    productive_s = sum(_seconds(followed.lines, "step_s"))
    return Account(
        n_launches=len(starts),
        n_attempts=len({event["attempt"] for event in events if _is_count(event, "attempt")}),
        faults=dict(sorted(Counter(str(event.get("kind")) for event in faults).items())),
        detected_s_mean=_mean(detected),
        detected_s_max=max(detected, default=None),
        restart_s_mean=_mean(restarted),
        restart_s_max=max(restarted, default=None),
        lost_steps=followed.lost_steps,
        n_rollbacks=kinds["rollback"],
        n_skipped=kinds["skipped"],
        wall_s=round(wall_s, 3),
        idle_s=round(idle_s, 3),
        productive_s=round(productive_s, 3),
        goodput=round(productive_s / wall_s, 4) if wall_s else None,
    )


@dataclass(frozen=True)
class _Followed:
    lines: list[Record]
    lost_steps: int


def _follow(metrics: Iterable[Record], events: Sequence[Record]) -> _Followed:
    """Go through the attempts in order, each cutting off what came after its beginning."""
    of_attempt: dict[int, dict[int, Record]] = defaultdict(dict)
    for line in metrics:
        if "loss" in line and all(_is_count(line, key) for key in ("attempt", "step", "samples")):
            of_attempt[line["attempt"]][line["step"]] = line
    began_at: dict[int, int] = {}
    reached: dict[int, int] = defaultdict(int)
    for event in events:
        if _is_count(event, "attempt") and _is_count(event, "step"):
            if event.get("event") == "resumed":
                began_at[event["attempt"]] = event["step"]
            elif event.get("event") == "fault":  # it may know of a step that no line tells of
                reached[event["attempt"]] = event["step"]
    kept: list[Record] = []
    end = lost = 0
    active = {*of_attempt, *began_at, *(attempt for attempt, step in reached.items() if step)}
    for attempt in sorted(active):
        begin = began_at.get(attempt, 0)
        lost += max(0, end - begin)
        del kept[bisect_right(kept, begin, key=_step) :]
        own = of_attempt.get(attempt, {})
        kept += [own[step] for step in sorted(own) if step > begin]
        end = max(begin, reached[attempt], *own)
    return _Followed(_without_late(kept, events, after=max(active, default=-1)), lost)


def _without_late(lines: list[Record], events: Sequence[Record], *, after: int) -> list[Record]:
    """Leave out what was written once an attempt later than `after` had started.

    That attempt has not said where it goes on; it can be nowhere before the newest checkpoint.
    """
    saves = (e for e in events if e.get("event") == "checkpoint" and _is_count(e, "step"))
    saved = max((e["step"] for e in saves), default=0)
    starts = (
        _time(e)
        for e in events
        if e.get("event") == "attempt_started" and _is_count(e, "attempt") and e["attempt"] > after
    )
    since = min((time for time in starts if time is not None), default=inf)
    return [line for line in lines if line["step"] <= saved or (_time(line) or 0.0) <= since]


def _launches(events: Iterable[Record]) -> list[float]:
    """Return when each launch began its first attempt, in seconds since the epoch.

    An attempt belongs to the launch before it if a fault or a rollback came in between, and
    nothing that ends a launch.
    """
    starts: list[float] = []
    newest, ended = -1, True
    for event in events:
        kind, time = event.get("event"), _time(event)
        if _is_count(event, "attempt") and event["attempt"] > newest and time is not None:
            newest = event["attempt"]
            if ended:
                starts.append(time)
            ended = True  # until something says why another attempt follows
        if kind in ("fault", "rollback"):
            ended = False
        elif kind in ("stopped", "finished", "gave_up"):
            ended = True
    return sorted(starts)


def _wall(starts: Sequence[float], records: Iterable[Record]) -> tuple[float, float]:
    """Return the seconds within launches, and those between them."""
    if not starts:
        return 0.0, 0.0
    times = sorted(time for time in map(_time, records) if time is not None)
    # A launch ends with the last record before the next one begins.
    ends = [
        max(start, times[max(0, bisect_left(times, later) - 1)])
        for start, later in pairwise(starts)
    ] + times[-1:]
    wall_s = sum(end - start for start, end in zip(starts, ends, strict=True))
    idle_s = sum(later - end for later, end in zip(starts[1:], ends, strict=False))
    return float(wall_s), float(idle_s)


def _seconds(records: Iterable[Record], key: str) -> list[float]:
    values = (record.get(key) for record in records)
    return [float(v) for v in values if isinstance(v, (int, float)) and 0 <= v < _LONGEST_S]


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def _is_count(record: Record, key: str) -> bool:
    """Whether it is there and sound: a log may be damaged, and is read all the same."""
    return type(record.get(key)) is int and record[key] >= 0


def _time(record: Record) -> float | None:
    """Return when a record was written, in seconds since the epoch."""
    try:
        return datetime.fromisoformat(record["time"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _step(line: Record) -> int:
    return int(line["step"])
