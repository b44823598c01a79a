"""Finding the newest checkpoint that can be trusted, and filling a run from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from mpt.checkpoint.layout import (
    CORRUPT,
    Manifest,
    committed,
    damage,
    model_of,
    read_manifest,
    set_aside,
    step_directory,
    step_of,
)
from mpt.checkpoint.tensors import read_tensors
from mpt.dist import Ranks, any_rank, from_first
from mpt.errors import CheckpointError, OtherFormatError
from mpt.recipe.model import Model
from mpt.state import RunState

Reject = Callable[[Path, list[str]], None]
"""Called on every rank with a checkpoint that is passed over, and what is wrong with it."""


def restore(
    checkpoints: Path,
    tensors: Mapping[str, Tensor],
    model: Model,
    ranks: Ranks,
    *,
    reject: Reject,
    after: int = -1,
) -> RunState | None:
    """Fill `tensors` from the newest checkpoint that verifies, at any world size.

    Args:
        after: only from one of a later step: there is another way to go on from this one.

    Returns:
        The state to go on from, or None if there is none, and `tensors` are as they were.

    Raises:
        CheckpointError: if there are checkpoints but not one of them is whole, or if the
            newest one is of another model.
    """
    newest = newest_verified(checkpoints, ranks, reject=reject, after=after)
    if newest is None:
        return None
    manifest = read_manifest(newest)
    check_same_model(newest, manifest, model)
    read_tensors(tensors, newest)
    return manifest.state


def newest_verified(
    checkpoints: Path, ranks: Ranks, *, reject: Reject, after: int = -1
) -> Path | None:
    """Return the newest committed checkpoint whose every file is as its manifest says.

    Rank 0 lists the directory and the others follow, so that all take the same one; the
    hashing is shared out. What fails is set aside under the suffix `.corrupt`, never deleted.

    Args:
        after: those of this step and earlier ones do not count, and are not hashed.

    Raises:
        CheckpointError: if there were checkpoints and all of them were damaged, or the newest is
            of another format.
    """
    immovable: set[int] = set()
    while True:
        found = [step_of(path) for path in committed(checkpoints)] if ranks.is_first else []
        step = from_first(next((step for step in found if step not in immovable), -1))
        if step <= after:
            break
        directory = step_directory(checkpoints, step)
        problems = _problems(directory, ranks)
        if not any_rank(bool(problems)):
            return directory
        reject(directory, problems)
        if ranks.is_first:
            try:
                _set_aside(directory)
            except OSError:  # a disk that cannot be written to can still be read from
                immovable.add(step)
    if after >= 0:
        return None
    # Also when an earlier attempt set them aside: a run must not quietly begin from nothing.
    aside = len(set_aside(checkpoints)) + len(immovable) if ranks.is_first else 0
    if n_damaged := from_first(aside):
        raise CheckpointError(
            f"{checkpoints}: all {n_damaged} checkpoints are damaged and were set aside as "
            f"*{CORRUPT}. Restore one from a backup, or remove them to start over."
        )
    return None


def check_same_model(directory: Path, manifest: Manifest, model: Model) -> None:
    """Refuse a checkpoint whose network is not the one being trained.

    Raises:
        CheckpointError: naming each key that differs.
    """
    found, wanted = asdict(model_of(directory, manifest)), asdict(model)
    differing = [
        f"model.{key}: checkpoint {found[key]!r}, recipe {wanted[key]!r}"
        for key in sorted(wanted)
        if found[key] != wanted[key]
    ]
    if differing:
        raise CheckpointError(f"{directory}: is of another model. " + "; ".join(differing) + ".")


def _problems(directory: Path, ranks: Ranks) -> list[str]:
    try:
        manifest = read_manifest(directory)
    except OtherFormatError:  # nothing is wrong with it, so it stays where it is
        raise
    except CheckpointError as error:
        return [str(error)]
    return damage(directory, manifest, share=(ranks.rank, ranks.world_size))


def _set_aside(directory: Path) -> None:
    aside = directory.with_name(directory.name + CORRUPT)
    count = 1
    while aside.exists():
        count += 1
        aside = directory.with_name(f"{directory.name}{CORRUPT}-{count}")
    directory.rename(aside)
