"""Training throughput beside that of peers: the same shape, tokens and step, in turns.

    python -m tests.bench.compare --final --out tests/bench/compare.md      (an idle machine)
    python -m tests.bench.compare --threads 1 --clock cpu                   (one with other work)

Every contestant is a process of its own (tests/bench/contestants.py); one at a time takes steps,
the others wait. A ratio is ours over a peer's of the same round, so what slows the machine for a
while slows both; what is shown is the median of the rounds, and the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpt.launch.plan import GLIBC_KEEPS_MEMORY
from mpt.rundir import versions
from tests.bench.contestants import Shape

ROOT = Path(__file__).parent.parent.parent
SHAPES = {
    "d384 L6 h6 S512 V8192, 4 samples": Shape(384, 6, 6, 512, 8192, 4, "bf16"),
    "MPT-125M: d768 L12 h12 S1024 V50432, 1 sample": Shape(768, 12, 12, 1024, 50432, 1, "bf16"),
}
STEPS = dict(zip(SHAPES, (8, 4), strict=True))
"""Of one round."""
OURS = "mpt"


@dataclass(frozen=True)
class Entry:
    """A contestant and the allocator that it has."""

    name: str
    keeps_memory: bool

    @property
    def title(self) -> str:
        if self.name == OURS:
            return "mpt"
        return f"{self.name}, {'memory kept' if self.keeps_memory else 'as shipped'}"


ENTRIES = [
    Entry(OURS, True),
    *(Entry(name, keeps) for keeps in (False, True) for name in ("nanogpt", "transformers")),
]


class Contestant:
    """A process that takes steps when it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def answer(self) -> dict[str, Any]:
        """Wait for its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a contestant ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def take(self, steps: int) -> dict[str, Any]:
        """Have it take steps; return what they cost."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self.answer()


@contextmanager
def contestant(entry: Entry, shape: Shape, threads: int) -> Iterator[Contestant]:
    """Start a contestant, and wait until it has compiled and settled."""
    kept = {key: value for key, value in os.environ.items() if key not in GLIBC_KEEPS_MEMORY}
    environment = {**kept, "OMP_NUM_THREADS": str(threads)}
    if entry.keeps_memory:
        environment |= GLIBC_KEEPS_MEMORY
    command = [sys.executable, "-m", "tests.bench.contestants"]
    process = subprocess.Popen(
        [*command, entry.name, shape.to_json(), str(threads)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ready = Contestant(process)
        ready.answer()
        yield ready
    finally:
        process.kill()
        process.wait()


def race(shape: Shape, steps: int, rounds: int, threads: int) -> dict[Entry, list[dict[str, Any]]]:
    """Return what each round of each contestant cost."""
    costs: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in ENTRIES}
    with ExitStack() as stack:
        ready = {e: stack.enter_context(contestant(e, shape, threads)) for e in ENTRIES}
        for number in range(rounds):
            order = ENTRIES if number % 2 == 0 else ENTRIES[::-1]
            for entry in order:
                costs[entry].append(ready[entry].take(steps))
    return costs


def rows(costs: dict[Entry, list[dict[str, Any]]], tokens: int, clock: str) -> Iterator[str]:
    """Yield a line of the table for each contestant."""
    mine = [cost[f"{clock}_s"] for cost in costs[Entry(OURS, True)]]
    for entry, taken in costs.items():
        seconds = [cost[f"{clock}_s"] for cost in taken]
        speeds = [tokens / s for s in seconds]
        ratios = [s / m for s, m in zip(seconds, mine, strict=True)]
        peak = max(cost["peak_bytes"] for cost in taken)
        yield (
            f"| {entry.title} | {statistics.median(speeds):,.0f} "
            f"| {min(speeds):,.0f} to {max(speeds):,.0f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} | {peak / 1e6:,.0f} |"
        )


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the document, as they are measured."""
    per = "s" if arguments.clock == "wall" else "CPU second"
    for name, shape in SHAPES.items():
        if arguments.only and arguments.only not in name:
            continue
        for precision in arguments.precision.split(","):
            yield f"**{name}, {precision}**"
            yield ""
            yield f"| | tokens/{per} | spread | mpt is faster by | spread | peak memory, MB |"
            yield "|---|---|---|---|---|---|"
            costs = race(
                replace(shape, precision=precision),
                STEPS[name],
                arguments.rounds,
                arguments.threads,
            )
            yield from rows(costs, shape.tokens * STEPS[name], arguments.clock)
            yield ""


def conditions(arguments: argparse.Namespace) -> str:
    """Say where and how it was measured."""
    about = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
    used = versions()
    return (
        f"{about}, {arguments.threads} threads, torch {used['torch']}, "
        f"Python {platform.python_version()}, {arguments.rounds} rounds in turns, medians; "
        f"seconds of {'the clock' if arguments.clock == 'wall' else 'all threads together'}."
    )


def main() -> None:
    """Print the document, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--final", action="store_true", help="wall clock, two threads, 7 rounds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--precision", default="bf16", help="bf16, fp32, or both by a comma")
    parser.add_argument("--only", help="a part of the name of a shape")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.final:
        arguments.rounds, arguments.clock = 7, "wall"
    lines = [conditions(arguments), ""]
    print("\n".join(lines), flush=True)
    for line in report(arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
