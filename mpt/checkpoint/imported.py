"""Weights from elsewhere as a checkpoint: of step 0, without moments, whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mpt.checkpoint.layout import (
    MANIFEST,
    File,
    Kind,
    Manifest,
    shard_name,
    step_of,
)
from mpt.checkpoint.stream import SHARD_BYTES, Form, share_out, write_file
from mpt.checkpoint.weights import Weights
from mpt.errors import CheckpointError, UsageError
from mpt.recipe.model import Model
from mpt.state import RunState
from mpt.storage import atomic_write, fsync_dir, hash_file

PARTIAL = ".partial"


def write_checkpoint(
    weights: Weights,
    model: Model,
    out_dir: Path,
    *,
    tokenizer: Mapping[str, bytes],
    beside: Mapping[str, bytes],
    versions: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `out_dir` as a committed checkpoint that holds these weights, each as it is stored.

    One tensor is in memory at a time.

    Args:
        tokenizer: its files, content by name.
        beside: files that tell of the checkpoint and are no part of it, content by name.
        versions: of what wrote it, by package.

    Raises:
        UsageError: if `out_dir` is taken, or named like a checkpoint of a later step.
    """
    out_dir = out_dir.resolve()
    refuse_taken(out_dir)
    partial = out_dir.with_name(out_dir.name + PARTIAL)
    _clear(partial, {*tokenizer, *beside})
    partial.mkdir(parents=True)
    try:
        kinds: dict[str, Kind] = dict.fromkeys(tokenizer, "tokenizer")
        for name, content in {**tokenizer, **beside}.items():
            atomic_write(partial / name, content)
        names = _write_weights(partial, weights, shard_bytes)
        kinds |= dict.fromkeys(names, "weights")
        manifest = Manifest(
            RunState(),
            world_size=len(names),
            model=asdict(model),
            recipe_sha256="",  # of none
            versions=dict(versions),
            files=tuple(_file(partial / name, kind) for name, kind in kinds.items()),
        )
        atomic_write(partial / MANIFEST, manifest.to_json())
        partial.rename(out_dir)
        fsync_dir(out_dir.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_taken(out_dir: Path) -> None:
    """Make sure that an import may have a name.

    Raises:
        UsageError: if something is there, or the name belongs to a step of a run.
    """
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UsageError(f"{out_dir}: is there already; name a new directory.")
    try:
        step = step_of(out_dir)
    except CheckpointError:
        return
    if step:
        raise UsageError(f"{out_dir}: is what a run calls its step {step}; choose another name.")


def _clear(partial: Path, ours: set[str]) -> None:
    """Remove what an import that was killed left behind, and nothing else."""
    if not partial.is_dir():
        return
    foreign = [
        path.name
        for path in sorted(partial.iterdir())
        if path.name not in ours | {MANIFEST}
        and not path.match("weights-*.safetensors")
        and not path.match(".*.tmp")
    ]
    if foreign:
        raise UsageError(f"{partial}: is of no import ({', '.join(foreign[:5])}); move it away.")
    shutil.rmtree(partial)


def _write_weights(directory: Path, weights: Weights, shard_bytes: int) -> list[str]:
    forms = {
        name: Form(weights.dtype(name), shape) for name, shape in sorted(weights.shapes.items())
    }
    groups = share_out(forms, shard_bytes)
    names = [shard_name("weights", number, len(groups)) for number in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        write_file(directory / name, {key: forms[key] for key in group}, weights.read)
    return names


def _file(path: Path, kind: Kind) -> File:
    return File(path.name, kind, path.stat().st_size, hash_file(path))
