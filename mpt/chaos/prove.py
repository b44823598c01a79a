"""A recipe trained under faults and again without: the weights must be the same, bit for bit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpt.chaos.nodes import Nodes
from mpt.chaos.plan import Kind, Planned, plan
from mpt.chaos.report import Row, rows
from mpt.chaos.storm import Storm
from mpt.checkpoint.layout import step_directory
from mpt.errors import UsageError
from mpt.launch.attempt import INJECT
from mpt.launch.plan import gpu_names
from mpt.ledger import Ledger, read_ledger
from mpt.lineage import account, breaches, lineage, positions
from mpt.recipe import Recipe
from mpt.rundir import CHECKPOINTS, CHOSEN, LEDGER

MARK = "chaos.json"
"""What tells a directory that this made from one that it must not delete."""

HANG_S = 10.0
"""Patience with a silent rank; a run of its own has more (`launch.hang`)."""

_PATIENCE = ("min_s", "save_s", "eval_s")

SAVES = 12
"""Checkpoints of a run under test, if its recipe asks for fewer."""


@dataclass(frozen=True)
class Storms:
    """What is to happen."""

    n_faults: int
    kinds: tuple[Kind, ...]
    nodes: int
    """Supervisors, as if each were a machine."""
    nproc: int
    """Workers of each."""
    seed: int


@dataclass(frozen=True)
class Proof:
    """What came out."""

    rows: tuple[Row, ...]
    n_planned: int
    steps: int
    goodput: float | None
    """Of the run under faults: seconds of steps that count, by seconds in all."""
    lost_steps: int
    storm_s: float
    calm_s: float
    identical: bool
    """The weights of both runs are equal, bit for bit."""
    max_difference: float
    """Between any two weights of them."""
    breaches: tuple[str, ...]
    """Where the data was not passed over once, in order; none is the promise."""

    @property
    def held(self) -> bool:
        """Whether the run was as good as one without faults."""
        all_came = len(self.rows) >= self.n_planned
        survived = all(row.survived for row in self.rows)
        return self.identical and all_came and survived and not self.breaches


def prove(
    cfg: Recipe,
    recipe_file: Path,
    overrides: Sequence[str],
    directory: Path,
    storms: Storms,
    tell: Callable[[str], None],
) -> Proof:
    """Train a recipe under faults, then without, and compare.

    The run without faults is given the ledger of the other: an update that was skipped there for
    a loss that was not a number is skipped here as well. So what is compared is what a run makes
    of faults, and that the ledger is enough to tell. And what `auto` came to, for it may be timed.

    Args:
        overrides: of the recipe; they hold for both runs.
        directory: new; what both runs leave stays in it.

    Raises:
        UsageError: if the run is too short for so many faults.
        MptError: if one of the two did not come to its end.
    """
    try:
        planned = plan(storms.kinds, storms.n_faults, steps=cfg.train.steps, seed=storms.seed)
    except ValueError as error:
        raise UsageError(f"--faults {storms.n_faults}: {error}.") from error
    storm_dir, calm_dir = directory / "storm", directory / "calm"
    for run_dir in (storm_dir, calm_dir):
        run_dir.mkdir(parents=True)
    (directory / MARK).write_text(json.dumps({"seed": storms.seed}) + "\n", encoding="utf-8")
    changes = [*_settings(cfg, storms), *overrides]
    began = time.monotonic()
    with _nodes(recipe_file, changes, storm_dir, storms, planned) as nodes:
        storm = Storm(nodes, storm_dir, seed=storms.seed, tell=tell)
        storm.rage(planned)
    storm_s = time.monotonic() - began
    for path in filter(Path.exists, (storm_dir / LEDGER, storm_dir / CHOSEN)):
        shutil.copyfile(path, calm_dir / path.name)
    tell(f"the run under faults is done after {storm_s:,.0f} s; now the same without")
    began = time.monotonic()
    with _nodes(recipe_file, changes, calm_dir, storms, []) as nodes:
        Storm(nodes, calm_dir, seed=storms.seed, tell=tell).rage([])
    calm_s = time.monotonic() - began
    metrics, events = storm.metrics.records, storm.events.records
    spent = account(metrics, events)
    samples = cfg.train.global_batch_size
    ledger = Ledger.read(read_ledger(storm_dir), storm_dir / LEDGER, samples)
    difference = _difference(storm_dir, calm_dir, cfg.train.steps)
    return Proof(
        rows=tuple(rows(storm.struck, metrics, events)),
        n_planned=len(planned),
        steps=cfg.train.steps,
        goodput=spent.goodput,
        lost_steps=spent.lost_steps,
        storm_s=round(storm_s, 1),
        calm_s=round(calm_s, 1),
        identical=difference is None,
        max_difference=difference or 0.0,
        breaches=tuple(breaches(positions(lineage(metrics, events), samples), ledger)),
    )


def _settings(cfg: Recipe, storms: Storms) -> list[str]:
    """Return the changes that make faults come and go faster, and change no weight."""
    every = min(cfg.checkpoint.every_steps, max(1, cfg.train.steps // SAVES))
    return [
        f"checkpoint.every_steps={every}",
        f"checkpoint.keep={max(cfg.checkpoint.keep, 4)}",
        f"launch.max_restarts={storms.n_faults + 3}",
        *(f"launch.hang.{key}={min(getattr(cfg.launch.hang, key), HANG_S)}" for key in _PATIENCE),
        f"launch.nproc={storms.nproc}",
    ]


def _nodes(
    recipe_file: Path,
    changes: Sequence[str],
    run_dir: Path,
    storms: Storms,
    planned: Sequence[Planned],
) -> Nodes:
    command = ["train", str(recipe_file), *changes, "--run-dir", str(run_dir)]
    nan_steps = [fault.step for fault in planned if fault.kind == "nan"]
    environment = {INJECT: json.dumps({"nan_steps": nan_steps})} if nan_steps else {}
    return Nodes(
        command,
        run_dir,
        run_dir.parent,
        n=storms.nodes,
        environment=environment,
        gpus=gpu_names(),
    )


def _difference(one: Path, other: Path, step: int) -> float | None:
    """Return the largest difference between the final weights of two runs; None if equal."""
    import torch

    from mpt.checkpoint.weights import open_weights

    left, right = (open_weights(step_directory(run / CHECKPOINTS, step)) for run in (one, other))
    largest = None
    for name in left.shapes:
        a, b = left.read(name), right.read(name)
        if not torch.equal(a, b):
            largest = max(largest or 0.0, float((a - b).abs().max()))
    return largest
