"""What `auto` came to, settled once for a run on a kind of machine, and used again ever after.

Sums are made in another order with another size of microbatch. So a run that is restarted must
choose as it did before, also when it died before its first checkpoint: what was chosen lies in
`chosen.json` before the first step is taken, and each checkpoint's manifest has it too, for one
that was copied elsewhere. A run that grows and shrinks has an entry for each number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mpt.checkpoint.layout import committed, read_manifest
from mpt.dist import Ranks, any_rank, bytes_from_first
from mpt.errors import CheckpointError
from mpt.launch.attempt import newer_attempt
from mpt.log import utc_now
from mpt.recipe import Recipe
from mpt.recipe.fit import Fit
from mpt.recipe.machine import Machine
from mpt.recipe.premises import premises, recalled
from mpt.recipe.probing import Tried, probe_pays
from mpt.rundir import CHECKPOINTS, CHOSEN, CHOSEN_FORMAT, read_chosen
from mpt.storage import atomic_write
from mpt.train.probe import probe

By = Literal["estimate", "probe"]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A choice, and what it holds for."""

    fit: Fit
    premises: Mapping[str, Any]
    by: By
    tried: Sequence[Tried] = ()
    remembered: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what is written down of it."""
        tried = [
            {key: value for key, value in asdict(each).items() if value is not None}
            for each in self.tried
        ]
        chosen = self.fit.to_json()
        return {"premises": dict(self.premises), "chosen": chosen, "by": self.by, "tried": tried}


def recall(
    run_dir: Path, recipe: Recipe, machine: Machine, estimate: Fit, ranks: Ranks
) -> Settled | None:
    """Return what was chosen before on equal premises, the same on all ranks, or None."""
    here = premises(recipe, machine, ranks.world_size)
    found: Any = None
    if ranks.is_first:
        found = next((e for e in _entries(run_dir) if e.get("premises") == here), None)
    entry = json.loads(bytes_from_first(json.dumps(found).encode()))
    if entry is None:
        return None
    try:
        settled = Settled(
            fit=recalled(estimate, entry["chosen"], recipe, ranks.world_size),
            premises=here,
            by=entry["by"],
            remembered=True,
        )
    except (ValueError, KeyError):  # a stranger's; ours is of our own making
        return None
    if ranks.is_first and newer_attempt(run_dir) is None and found not in read_chosen(run_dir):
        with suppress(OSError):  # a manifest's word, and manifests are deleted one day
            _add(run_dir, found)
    return settled


def settle(
    run_dir: Path,
    recipe: Recipe,
    machine: Machine,
    estimate: Fit,
    model: nn.Module,
    ranks: Ranks,
    *,
    beat: Callable[[], None],
    complain: Callable[[str], None],
) -> Settled:
    """Return the choice that a run begins with on these premises, and write it down for good.

    Args:
        model: built for `estimate`; it is as it was afterwards.
        beat: is called now and then: the process is alive.
        complain: is told, on every rank, if the choice could not be written.
    """
    here = premises(recipe, machine, ranks.world_size)
    settled = Settled(fit=estimate, premises=here, by="estimate")
    if probe_pays(recipe, machine, estimate, ranks.world_size):
        fit, tried = probe(model, recipe, machine, estimate, ranks, beat=beat)
        settled = Settled(fit=fit, premises=here, by="probe", tried=tried)
    if _remember(run_dir, settled, ranks):
        return settled
    # What cannot be remembered has to come out the same again: arithmetic does, a clock does not.
    complain(f"{CHOSEN} could not be written; `auto` is as the estimate has it")
    return Settled(fit=estimate, premises=here, by="estimate")


def _remember(run_dir: Path, settled: Settled, ranks: Ranks) -> bool:
    """Write a choice down for good, and return whether that was possible; the same on all ranks."""
    failed = False
    if ranks.is_first and newer_attempt(run_dir) is None:  # what a given-up group says is void
        try:
            _add(run_dir, {**settled.to_json(), "time": utc_now()})
        except OSError:
            failed = True
    return not any_rank(failed)


def _add(run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Write an entry to `chosen.json`, in the place of one on equal premises."""
    others = [e for e in read_chosen(run_dir) if e.get("premises") != entry["premises"]]
    content = {"format": CHOSEN_FORMAT, "choices": [*others, entry]}
    atomic_write(run_dir / CHOSEN, json.dumps(content, indent=1) + "\n")


def _entries(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield what is written down, the run directory's own word first."""
    yield from read_chosen(run_dir)
    for directory in committed(run_dir / CHECKPOINTS)[:1]:
        try:
            chosen = read_manifest(directory).chosen
        except CheckpointError:
            continue  # restoring it will say so
        if chosen is not None:
            yield chosen
