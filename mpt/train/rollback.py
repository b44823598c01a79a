"""Going back: what is left behind so that the next attempt begins before the data that failed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from mpt.checkpoint.layout import committed, step_of
from mpt.checkpoint.save import SupersededError
from mpt.dist import Ranks, bytes_from_first
from mpt.errors import DivergedError, RollbackError
from mpt.launch.attempt import newer_attempt, this_attempt
from mpt.ledger import Entry, Ledger, RolledBack, append_entry, read_ledger
from mpt.log import Journal
from mpt.recipe.train import Health
from mpt.rundir import CHECKPOINTS, LEDGER
from mpt.state import Streak
from mpt.storage import fsync_dir

ROLLED_BACK = ".rolled-back"
"""Suffix of a checkpoint that a rollback left behind. Its weights are those from before the
streak, and no run that obeys the ledger comes to its position."""


def same_ledger(run_dir: Path, ranks: Ranks, global_batch_size: int) -> Ledger:
    """Return the run's ledger, from the same bytes on every rank.

    Raises:
        UsageError: if it is not one.
    """
    text = bytes_from_first(read_ledger(run_dir) if ranks.is_first else b"")
    return Ledger.read(text, run_dir / LEDGER, global_batch_size)


def write_entry(run_dir: Path, entry: Entry) -> None:
    """Add a line to the ledger, unless this rank's group has been given up.

    Raises:
        OSError: it could not be written.
        SupersededError: a newer attempt has the run.
    """
    _stand_down_if_superseded(run_dir)
    append_entry(run_dir, entry)


def roll_back(
    streak: Streak, why: str, run_dir: Path, ledger: Ledger, cfg: Health, ranks: Ranks
) -> NoReturn:
    """Have the next attempt begin before the streak and pass over its data.

    Every rank calls it at the same step, once nothing is being written. Checkpoints from within
    the streak are set aside before the ledger is written: a crash in between only means that the
    streak is met, and this done, once more.

    Args:
        why: the last update of the streak was skipped.

    Raises:
        RollbackError: on every rank, when all is in place.
        DivergedError: on every rank, if the run has gone back as often as it may.
        OSError: on rank 0, if checkpoints or ledger could not be changed.
        SupersededError: on rank 0, if a newer attempt has the run.
    """
    first, last = streak.after_step + 1, streak.after_step + streak.n
    said = f"updates of steps {first:,} to {last:,} were skipped in a row, the last because {why}"
    where = {"attempt": this_attempt(), "positions": [streak.start, streak.stop], "why": said}
    journal = Journal(run_dir)
    if ledger.n_rollbacks >= cfg.max_rollbacks:
        if ranks.is_first:
            journal.event("diverged", step=last, **where)
        raise DivergedError(
            f"{run_dir}: {said}. The run has already gone back {ledger.n_rollbacks} times, and "
            f"health.max_rollbacks is {cfg.max_rollbacks}. Look at the data at positions "
            f"{streak.start:,} to {streak.stop - 1:,}, or go on more carefully: mpt resume "
            f"{run_dir} health.max_rollbacks={ledger.n_rollbacks + 3} optimizer.lr=LOWER"
        )
    if ranks.is_first:
        _stand_down_if_superseded(run_dir)
        to_step = _set_aside(run_dir / CHECKPOINTS, streak.after_step)
        write_entry(run_dir, RolledBack(streak.after_step, streak.start, streak.stop, said))
        journal.event("rollback", from_step=last, to_step=to_step, **where)
    dist.barrier()  # no rank ends before the ledger is written: its end would be a fault
    raise RollbackError(f"{said}; going on from an earlier checkpoint, past that data")


def _stand_down_if_superseded(run_dir: Path) -> None:
    if (newer := newer_attempt(run_dir)) is not None:
        raise SupersededError(f"attempt {newer} has the run, this one is {this_attempt()}")


def _set_aside(checkpoints: Path, after_step: int) -> int:
    """Rename the checkpoints of later steps, and return the newest step that is left, or 0."""
    found = committed(checkpoints)
    later = [directory for directory in found if step_of(directory) > after_step]
    for directory in later:
        aside = directory.with_name(directory.name + ROLLED_BACK)
        if aside.exists():  # from an earlier rollback to before this step
            shutil.rmtree(aside)
        directory.rename(aside)
    if later:
        fsync_dir(checkpoints)
    return max((step_of(directory) for directory in found[len(later) :]), default=0)
