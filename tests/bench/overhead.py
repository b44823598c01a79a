"""What the training loop adds to the steps it takes: data, records, agreement on stopping.

    python -m tests.bench.overhead RECIPE [KEY=VALUE]...        (its data must be prepared)

The run is a real one, in this process; what counts are seconds of the thread that trains, in all
steps and in `train_step` alone. Saves and copies in memory are turned off: they have intervals of
their own (tests/bench/checkpoint.md).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mpt import recipe
from mpt.dist import process_group
from mpt.launch.pulse import Pulse
from mpt.rundir import RECIPE
from mpt.train import loop, run
from mpt.train.stop import StopSignal

FIRST = 3
"""Steps that warm up, and do not count."""


def main() -> None:
    """Train, and print the share of the loop."""
    path, *overrides = sys.argv[1:]
    off = ["checkpoint.memory_every_steps=off", "launch.nproc=1"]
    cfg = recipe.absolute(recipe.load(Path(path), [*overrides, *off]))
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    laps: list[tuple[float, float]] = []
    bare = vars(loop)["train_step"]

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        result = bare(*args, **kwargs)
        laps.append((began, time.thread_time()))
        return result

    vars(loop)["train_step"] = timed
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        run_dir = Path(folder)
        recipe.freeze(cfg, run_dir / RECIPE)
        run.train(cfg, run_dir, ranks, sys.stderr, StopSignal.install(), Pulse.create())
    steps = list(zip(laps[FIRST:], laps[FIRST + 1 :], strict=False))
    shares = [(after[0] - now[1]) / (now[1] - now[0]) for now, after in steps]
    inside = statistics.median(now[1] - now[0] for now, _ in steps)
    print(
        f"{len(shares)} steps of {inside * 1e3:.1f} ms; the loop adds "
        f"{statistics.median(shares) * inside * 1e3:.2f} ms, {statistics.median(shares):.2%}"
    )


if __name__ == "__main__":
    main()
