"""What `tests/bench/gpu.sh` runs: tests, then measurements, each within a time of its own.

A part that fails or takes too long is written down as such, and the next one begins; so is one for
which no time is left. Nothing here is a claim: the numbers are in the files of `results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tests.bench.contestants import Shape

ROOT = Path(__file__).parent.parent.parent
TIME_S = 520.0
"""For all parts together: under nine minutes with what comes before and after."""
STEPS, WARMUP = 6, 3


@dataclass(frozen=True)
class Part:
    """One thing to do, in a process of its own."""

    name: str
    kind: Literal["tests", "mpt", "transformers"]
    limit_s: float
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    shape: Shape | None = None


def mpt(name: str, recipe: str, *overrides: str, limit_s: float = 70.0) -> Part:
    return Part(name, "mpt", limit_s, recipe, ("launch.nproc=1", *overrides))


def sizes(samples: int, microbatch: int | str = "auto") -> tuple[str, ...]:
    """Overrides for a step of so many samples."""
    return (f"train.global_batch_size={samples}", f"train.microbatch_size={microbatch}")


FULL = "train.activation_checkpointing=full"
LONG = "model.max_seq_len=4096"

ON_A_GPU = [
    Part("tests marked gpu", "tests", 150.0),
    mpt("1b", "mpt-1b", *sizes(32)),
    mpt("7b, full recomputation", "mpt-7b", *sizes(16, 8), FULL),
    mpt("7b at 4096, full recomputation", "mpt-7b", *sizes(8, 4), FULL, LONG),
    mpt("760m", "mpt-760m", *sizes(64)),
    mpt("125m", "mpt-125m", *sizes(128)),
    mpt("3b", "mpt-3b", *sizes(16)),
    Part(
        "transformers 1b", "transformers", 60.0, shape=Shape(2048, 16, 24, 2048, 50432, 4, "bf16")
    ),
    Part(
        "transformers 125m", "transformers", 45.0, shape=Shape(768, 12, 12, 2048, 50432, 16, "bf16")
    ),
    mpt("1b, sdpa with a bias", "mpt-1b", *sizes(32, 4), "train.attention=sdpa"),
    mpt("1b, not compiled", "mpt-1b", *sizes(32, 4), "train.compile=false"),
    mpt(
        "7b, selective recomputation",
        "mpt-7b",
        *sizes(8, 2),
        "train.activation_checkpointing=selective",
    ),
]
TINY = Shape(64, 2, 2, 64, 512, 2, "bf16")
ON_A_CPU = [
    Part("tests marked gpu", "tests", 150.0),
    mpt("tiny", "tiny", *sizes(4)),
    mpt("tiny at 512, full recomputation", "tiny", *sizes(4, 2), FULL, "model.max_seq_len=512"),
    mpt("tiny, flex: fails on a CPU", "tiny", *sizes(4), "train.attention=flex"),
    mpt("tiny, out of time", "tiny", *sizes(4), limit_s=0.1),
    Part("transformers tiny", "transformers", 90.0, shape=TINY),
]


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """Do a part within so many seconds; return what it found, or why it did not."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command(part),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=complaints,
            text=True,
            start_new_session=True,  # so that all of it can be ended
        )
        try:
            asked = f"{STEPS}\n" if part.kind == "transformers" else ""
            process.communicate(asked, timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"failed": f"not done within {limit_s:.1f} s", "seconds": limit_s}
        output.seek(0), complaints.seek(0)
        said, complained = output.read(), complaints.read()
    seconds = time.monotonic() - began
    if part.kind == "tests":
        last = (said.strip().splitlines() or [complained[-300:]])[-1]
        failures = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        found = {"exit_code": process.returncode, "summary": last, "failures": failures}
        return {**found, "seconds": seconds}
    if process.returncode != 0:
        return {"failed": (complained or said).strip()[-1500:], "seconds": seconds}
    return {**figures(part, said), "seconds": seconds}


def command(part: Part) -> list[str]:
    """Return what to start for a part."""
    match part.kind:
        case "tests":
            # Without the project's settings: they want plugins that a bare machine lacks.
            asked = ["-c", os.devnull, "--rootdir", str(ROOT), "-m", "gpu", "-q", "-rf"]
            return [sys.executable, "-m", "pytest", *asked, "tests/gpu"]
        case "mpt":
            return [sys.executable, "-m", "tests.bench.gpu", "--part", json.dumps(asdict(part))]
        case "transformers":
            assert part.shape is not None
            program = [sys.executable, "-m", "tests.bench.contestants", "transformers"]
            return [*program, part.shape.to_json(), "8"]


def figures(part: Part, said: str) -> dict[str, Any]:
    """Return the numbers that a process has printed."""
    last: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    if part.kind == "mpt":
        return last
    assert part.shape is not None
    tokens = STEPS * part.shape.tokens
    return {
        "tokens_per_second": tokens / last["wall_s"],
        "peak_memory_bytes": last["peak_bytes"],
        "chosen": {"microbatch_size": part.shape.batch, "attention": "eager", "compile": False},
    }


def measure_part(raw: dict[str, Any]) -> None:
    """Be the process of a part: what `mpt bench --json` prints."""
    from mpt import recipe
    from mpt.bench.run import bench
    from mpt.errors import MptError

    path = ROOT / "recipes" / f"{raw['recipe']}.yaml"
    try:
        cfg = recipe.load(path, raw["overrides"])
        print(json.dumps(bench(cfg, steps=STEPS, warmup=WARMUP, real=False)))
    except MptError as error:
        raise SystemExit(str(error)) from None


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each part."""
    columns = ["", "tokens/s", "MFU", "causal", "peak memory, GiB", "attention", "compiled"]
    columns += ["microbatch", "took, s"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name, found in results.items():
        took = f"{found['seconds']:.0f}"
        if "tokens_per_second" not in found:
            why = found.get("summary") or found["failed"].strip().splitlines()[-1]
            yield f"| {name} | {why[:90]} {'| ' * (len(columns) - 3)}| {took} |"
            continue
        mfu, causal = (
            f"{found[key]:.1%}" if found.get(key) else "-" for key in ("mfu", "causal_mfu")
        )
        chosen, peak = found["chosen"], found["peak_memory_bytes"] / 2**30
        yield (
            f"| {name} | {found['tokens_per_second']:,.0f} | {mfu} | {causal} | {peak:.1f} | "
            f"{chosen['attention']} | {chosen['compile']} | {chosen['microbatch_size']} | {took} |"
        )


def main() -> None:
    """Do all parts that there is time for, and write down what became of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny models")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measure_part(json.loads(arguments.part))
        return
    started = datetime.now(UTC)
    until = time.monotonic() + TIME_S
    folder = Path(tempfile.mkdtemp()) if arguments.dry else ROOT / "tests/bench/results"
    folder.mkdir(exist_ok=True)
    stem = folder / f"gpu-{started:%Y-%m-%d-%H%M}"
    results: dict[str, dict[str, Any]] = {}
    for part in ON_A_CPU if arguments.dry else ON_A_GPU:
        left = until - time.monotonic()
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        if left < 5:
            results[part.name] = {"failed": "no time was left", "seconds": 0.0}
        else:
            results[part.name] = run(part, min(part.limit_s, left))
        # After each: what is killed from outside leaves what it had.
        lines = [f"`bash tests/bench/gpu.sh`, {started:%Y-%m-%d %H:%M} UTC", "", *table(results)]
        Path(f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
        Path(f"{stem}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"{stem}.json", file=sys.stderr)


if __name__ == "__main__":
    main()
