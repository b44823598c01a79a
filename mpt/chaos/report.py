"""What a storm has shown: a row a fault, from what was struck and what the run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mpt.chaos.storm import Struck

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One fault, and what it cost."""

    fault: str
    target: str
    step: int
    detected_s: float | None
    """From the fault until the run said so; None if nobody had to notice."""
    recovered_s: float | None
    """From the fault until the next step was finished; None if none was."""
    recomputed: int
    """Steps that had to be taken again."""
    resumed_from: str
    """memory, disk, or the beginning; empty if nothing was resumed."""

    @property
    def survived(self) -> bool:
        """Whether training went on."""
        return self.recovered_s is not None


def rows(
    struck: Sequence[Struck], metrics: Sequence[Record], events: Sequence[Record]
) -> list[Row]:
    """Return a row for each fault that was made, and for each update skipped because of one."""
    found = [_row(fault, metrics, events) for fault in struck]
    found += [_skipped(event, metrics) for event in events if event.get("event") == "skipped"]
    return sorted(found, key=lambda row: row.step)


def _row(fault: Struck, metrics: Sequence[Record], events: Sequence[Record]) -> Row:
    after = [event for event in events if _time(event) >= fault.at]
    told = [e for e in after if e.get("event") == "fault" and e.get("attempt") == fault.attempt]
    if fault.kind == "corrupt checkpoint":
        told = [e for e in after if e.get("event") == "checkpoint_rejected"]
    steps = [line for line in metrics if "loss" in line]
    newer = [line for line in steps if int(line.get("attempt", -1)) > fault.attempt]
    resumed = [e for e in after if e.get("event") == "resumed" and e["attempt"] > fault.attempt]
    before = [int(line["step"]) for line in steps if int(line.get("attempt", -1)) <= fault.attempt]
    recomputed = 0
    if newer:
        recomputed = max(before, default=0) - (int(resumed[0]["step"]) if resumed else 0)
    return Row(
        fault.kind,
        fault.target,
        fault.step,
        _since(fault, told),
        _since(fault, newer),
        max(recomputed, 0),
        str(resumed[0].get("source", "disk")) if resumed else "the beginning" if newer else "",
    )


def _skipped(event: Record, metrics: Sequence[Record]) -> Row:
    """A step left out needs no repair: the next one is taken at once."""
    line = next((m for m in metrics if m.get("step") == event["step"] + 1 and "loss" in m), None)
    took = None if line is None else round(_time(line) - _time(event), 3)
    return Row("nan", "update skipped on all ranks", int(event["step"]), 0.0, took, 0, "")


def _since(fault: Struck, records: Sequence[Record]) -> float | None:
    return round(_time(records[0]) - fault.at, 3) if records else None


def _time(record: Record) -> float:
    return datetime.fromisoformat(str(record["time"])).timestamp()
