"""A directory in Hugging Face's format as a checkpoint: to train on from, or to export anew."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mpt.checkpoint.imported import refuse_taken, write_checkpoint
from mpt.checkpoint.stream import SHARD_BYTES
from mpt.errors import DataError, UsageError
from mpt.hf.card import SOURCE_FILE
from mpt.hf.directory import Opened, is_exported, open_directory
from mpt.hf.names import Architecture
from mpt.recipe.model import Model
from mpt.rundir import versions
from mpt.tokenizer import JSON_FILE, MODEL_FILE, load_tokenizer, tokenizer_files


@dataclass(frozen=True)
class Imported:
    """What was read, and what became of it."""

    directory: Path
    files: tuple[str, ...]
    bytes: int
    architecture: Architecture
    """What it was in transformers."""
    model: Model
    n_parameters: int
    dtypes: tuple[str, ...]
    """What tensors are stored as, here as there."""
    notes: tuple[str, ...]
    """What a user should know, a sentence each."""


def import_directory(source: Path, out_dir: Path, *, shard_bytes: int = SHARD_BYTES) -> Imported:
    """Write the model in `source` as a checkpoint directory: whole, or not at all.

    No number is changed: exported again, the tensors are the same bytes.

    Raises:
        UsageError: if `source` is no such directory, or `out_dir` is taken.
        CheckpointError: if it holds no model of ours, or is damaged; names every option in the
            way at once.
        DataError: if its tokenizer cannot be used, or has more ids than the model.
    """
    refuse_taken(out_dir.resolve())
    if not is_exported(source):
        raise UsageError(f"{source}: holds no config.json, so it is no model of Hugging Face's.")
    opened = open_directory(source)
    tokenizer_file = _usable_tokenizer(source, opened.model)
    write_checkpoint(
        opened.weights,
        opened.model,
        out_dir,
        tokenizer={} if tokenizer_file is None else tokenizer_files(tokenizer_file),
        beside={SOURCE_FILE: json.dumps({"imported_from": source.resolve().name}).encode()},
        versions=versions(),
        shard_bytes=shard_bytes,
    )
    files = sorted(out_dir.iterdir())
    weights = opened.weights
    return Imported(
        directory=out_dir,
        files=tuple(path.name for path in files),
        bytes=sum(path.stat().st_size for path in files),
        architecture=opened.architecture,
        model=opened.model,
        n_parameters=sum(prod(shape) for shape in weights.shapes.values()),
        dtypes=tuple(sorted({piece.dtype for found in weights.pieces.values() for piece in found})),
        notes=_notes(opened, tokenizer_file),
    )


def _usable_tokenizer(source: Path, model: Model) -> Path | None:
    """Return the tokenizer that can be used, the original before what was made of it."""
    there = [path for name in (MODEL_FILE, JSON_FILE) if (path := source / name).is_file()]
    why: list[str] = []
    for path in there:
        try:
            n_ids = load_tokenizer(path).vocab_size
        except DataError as error:
            why.append(str(error))
            continue
        if n_ids <= model.vocab_size:
            return path
        why.append(f"{path}: has {n_ids} ids, and the model only {model.vocab_size}.")
    if why:
        raise DataError(
            "\n".join(why) + "\nTo import the weights alone, take the tokenizer out of the "
            "directory first; text cannot be read then."
        )
    return None


def _notes(opened: Opened, tokenizer_file: Path | None) -> tuple[str, ...]:
    notes = []
    if opened.ignored:
        more = f" and {len(opened.ignored) - 1} like it" if len(opened.ignored) > 1 else ""
        notes.append(f"{opened.ignored[0]}{more} follows from the rest, and is left out.")
    if tokenizer_file is None:
        notes.append("there is no tokenizer, so the checkpoint has none: text cannot be read.")
    return tuple(notes)
