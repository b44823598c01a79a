"""A small run on the ranks of a test: as many attempts as it takes, as a supervisor would."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpt.checkpoint.layout import read_manifest, step_directory
from mpt.checkpoint.weights import open_weights
from mpt.dist import Ranks
from mpt.errors import DivergedError, RollbackError
from mpt.launch.attempt import ATTEMPT, INJECT
from mpt.launch.pulse import Beat, Phase, Pulse
from mpt.ledger import Entry, Ledger, RolledBack, read_ledger
from mpt.recipe.data import Data, EvalData, Stream, Tokenizer
from mpt.recipe.recipe import Recipe
from mpt.recipe.train import Checkpoint, Evaluation, Health, Optimizer, Schedule, Train
from mpt.rundir import LEDGER, METRICS
from mpt.state import RunState
from mpt.train.run import train
from tests.data.cases import small_model, write_dataset, write_tokenizer
from tests.tiny_model import digest
from tests.world import on_ranks

SAMPLES = 4
STEPS = 18
MOST_ATTEMPTS = 8

DONE, ROLLED_BACK, STOPPED = "done", "rolled back", "stopped"


def prepared(root: Path, **health: Any) -> Recipe:
    """Return a recipe whose data lies in `root`: 18 steps, saved every 4, evaluated every 6."""
    draw = np.random.default_rng(0)
    for name, n in (("train", 50), ("eval", 6)):
        if not (root / name).exists():
            # Some samples are easier than others, so that losses go up and down.
            variety = draw.choice([2, 300], (n, 1))
            write_dataset(root / name, draw.integers(0, variety, (n, 16)))
    settings: dict[str, Any] = {"spike_window": 4, "max_skipped_in_a_row": 3, "max_rollbacks": 2}
    return Recipe(
        run="test",
        seed=3,
        model=replace(small_model(), resid_pdrop=0.1),
        tokenizer=Tokenizer(path=str(write_tokenizer(root / "tokenizer.model"))),
        data=Data(
            streams={"only": Stream(path=f"{root}/train")}, eval=EvalData(path=f"{root}/eval")
        ),
        train=Train(steps=STEPS, global_batch_size=SAMPLES, microbatch_size=2, precision="fp32"),
        optimizer=Optimizer(lr=1e-2),
        schedule=Schedule(warmup_steps=2),
        eval=Evaluation(every_steps=6),
        checkpoint=Checkpoint(every_steps=4, keep=9),
        health=Health(**settings | health),
    )


class StopOnce:
    """A stop signal that comes when this rank's pulse has told of something."""

    def __init__(self, pulse: Pulse, phase: Phase, step: int) -> None:
        self._pulse, self._phase, self._step = pulse, phase, step
        self._number = 0

    @property
    def number(self) -> int:
        beat: Beat = self._pulse.read()
        if (beat.phase, beat.step) == (self._phase, self._step):
            self._number = 15
        return self._number


def one_attempt(
    ranks: Ranks, cfg: Recipe, run_dir: Path, number: int, faults: dict[str, Any], stop: Any
) -> str:
    """Return how an attempt ended."""
    os.environ[ATTEMPT] = str(number)
    os.environ[INJECT] = json.dumps(faults)
    pulse = Pulse.create()
    stops: Any = StopOnce(pulse, *(stop or (Phase.END, -1)))
    with Path(os.devnull).open("w") as terminal:
        try:
            stopped_by = train(cfg, run_dir, ranks, terminal, stops, pulse)
        except RollbackError:
            return ROLLED_BACK
        except DivergedError as error:
            return str(error)
    return DONE if stopped_by is None else STOPPED


def run(
    cfg: Recipe,
    run_dir: Path,
    *,
    nproc: int = 1,
    faults: dict[str, Any] | None = None,
    stops: Iterable[tuple[Phase, int] | None] = (),
    before: Callable[[int], None] = lambda number: None,
) -> list[str]:
    """Train until done, or until it ends for good, and return how each attempt ended.

    Args:
        faults: to inject, as MPT_INJECT has them.
        stops: for each attempt, phase and steps finished at which it is asked to stop.
        before: called with the number of each attempt before it begins.
    """
    run_dir.mkdir(exist_ok=True)
    when = iter(stops)
    ends: list[str] = []
    while not ends or ends[-1] in (ROLLED_BACK, STOPPED):
        assert len(ends) < MOST_ATTEMPTS, ends
        number = len(ends)
        before(number)
        (end, *others) = on_ranks(
            nproc, one_attempt, cfg, run_dir, number, faults or {}, next(when, None)
        )
        assert others == [end] * (nproc - 1), "ranks disagree"
        ends.append(end)
    return ends


def replay(cfg: Recipe, run_dir: Path, copy: Path, nproc: int = 1) -> list[str]:
    """Train anew in `copy` with the ledger of the run in `run_dir`, and nothing else of it."""
    copy.mkdir()
    (copy / LEDGER).write_bytes(read_ledger(run_dir))
    return run(cfg, copy, nproc=nproc)


def final(run_dir: Path, step: int = STEPS) -> tuple[str, RunState]:
    """Return a digest of the last weights, and the state that goes with them."""
    directory = step_directory(run_dir / "checkpoints", step)
    weights = open_weights(directory)
    state = read_manifest(directory).state
    return digest({name: weights.read(name) for name in weights.shapes}), state


def entries(run_dir: Path) -> tuple[Entry, ...]:
    """Return what the ledger of a run says."""
    return Ledger.read(read_ledger(run_dir), run_dir / LEDGER, SAMPLES).entries


def assert_one_pass(run_dir: Path, steps: int = STEPS) -> None:
    """Check that the final lineage has each position once, but for what the ledger passes over."""
    last = {
        line["step"]: line["samples"]
        for line in map(json.loads, (run_dir / METRICS).read_text().splitlines())
        if "loss" in line
    }
    assert sorted(last) == list(range(1, steps + 1))
    read = [p for stop in last.values() for p in range(stop - SAMPLES, stop)]
    windows = [(e.start, e.stop) for e in entries(run_dir) if isinstance(e, RolledBack)]
    passed_over = {p for start, stop in windows for p in range(start, stop)}
    assert sorted(read) == [p for p in range(max(read) + 1) if p not in passed_over]
