"""What a checkpoint is on disk, and what "committed" means. No torch, no process group.

    RUN_DIR/checkpoints/step-00001000/
        weights-00001-of-00002.safetensors      rank 0's rows of every weight
        optimizer-00001-of-00002.safetensors    rank 0's rows of every moment
        tokenizer.model                         so that the directory can be used on its own; or
                                                tokenizer.json and tokenizer_config.json
        manifest.json                           written last; names every other file and its hash

While it is written the directory is called step-00001000.attempt-3.partial: two groups of workers
never write the same files. It is committed once it is renamed to what is above. It may be resumed
from if, besides, every file is as the manifest says (`damage`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mpt.errors import CheckpointError, OtherFormatError, RecipeError
from mpt.recipe.model import Model
from mpt.recipe.plain import model_from
from mpt.rundir import CHECKPOINTS
from mpt.state import RunState
from mpt.storage import hash_file, read_json

FORMAT = 3
MANIFEST = "manifest.json"
CORRUPT = ".corrupt"

Kind = Literal["weights", "optimizer", "tokenizer"]
KINDS: tuple[Kind, ...] = ("weights", "optimizer", "tokenizer")

_STEP_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL_NAME = re.compile(r"step-\d{8,}\.attempt-(\d+)\.partial")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MANIFEST_LIMIT_BYTES = 1 << 28


@dataclass(frozen=True)
class File:
    """What the manifest says of one file."""

    name: str
    kind: Kind
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint except its tensors."""

    state: RunState
    world_size: int
    model: dict[str, Any]
    """The `model:` section of the recipe: enough to build the network again."""
    recipe_sha256: str
    versions: dict[str, str]
    files: tuple[File, ...]
    chosen: dict[str, Any] | None = None
    """What `auto` came to, and on which premises; None in weights that no run has saved."""
    format: int = FORMAT

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved."""
        return self.state.step

    def to_json(self) -> str:
        """Return the text of manifest.json, with a hash over the rest of it."""
        content = asdict(self)
        sealed = {**content, "sha256": _seal(content)}
        return json.dumps(sealed, indent=1, sort_keys=True) + "\n"

    def names(self, kind: Kind) -> list[str]:
        """Return the names of the files of one kind."""
        return sorted(file.name for file in self.files if file.kind == kind)


def step_directory(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies once committed."""
    return checkpoints / f"step-{step:08d}"


def partial_directory(checkpoints: Path, step: int, attempt: int) -> Path:
    """Return where the checkpoint of `step` is put together by the workers of one attempt."""
    return checkpoints / f"step-{step:08d}.attempt-{attempt}.partial"


def leftovers(checkpoints: Path, attempt: int) -> list[Path]:
    """Return what saves of this attempt and earlier ones have left half-written."""
    if not checkpoints.is_dir():
        return []
    found = ((path, _PARTIAL_NAME.fullmatch(path.name)) for path in checkpoints.iterdir())
    return sorted(path for path, match in found if match and int(match[1]) <= attempt)


def shard_name(kind: Kind, rank: int, world_size: int) -> str:
    """Return the name of one rank's file, counted from 1 as Hugging Face does."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def committed(checkpoints: Path) -> list[Path]:
    """Return the committed checkpoints, newest first."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def set_aside(checkpoints: Path) -> list[Path]:
    """Return the damaged checkpoints that were moved out of the way."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if CORRUPT in p.name)


def step_of(directory: Path) -> int:
    """Return the step that a committed checkpoint's name tells."""
    match = _STEP_NAME.fullmatch(directory.name)
    if match is None:
        raise CheckpointError(f"{directory}: is not named like a checkpoint (step-00001000).")
    return int(match[1])


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint, which may come from a stranger.

    Raises:
        OtherFormatError: it is whole, and another version's.
        CheckpointError: if it is missing, not ours, or names files outside its directory.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{path}: is missing, so this is not a complete checkpoint.")
    raw = read_json(path, limit_bytes=_MANIFEST_LIMIT_BYTES, error=CheckpointError)
    try:
        if raw.pop("sha256", None) != _seal(raw):
            raise ValueError("its bytes have changed since it was written")
        if raw.get("format") != FORMAT:
            raise OtherFormatError(
                f"{path}: format {raw.get('format')!r} is not {FORMAT}, the one read here; use the "
                "version of mpt that wrote it, or start another run."
            )
        files = tuple(_read_file(entry) for entry in raw.pop("files"))
        manifest = Manifest(**raw | {"state": RunState.from_json(raw.get("state"))}, files=files)
        if not isinstance(manifest.world_size, int) or manifest.world_size < 1:
            raise ValueError("world_size is not a count")
        if not isinstance(manifest.model, dict):
            raise ValueError("model is not a mapping")
        if not isinstance(manifest.chosen, dict | None):
            raise ValueError("chosen is not a mapping")
        if _STEP_NAME.fullmatch(directory.name) and manifest.step != step_of(directory):
            raise ValueError(f"it is of step {manifest.step}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a manifest: {error}") from error
    return manifest


def damage(
    directory: Path,
    manifest: Manifest,
    share: tuple[int, int] = (0, 1),
    kinds: Collection[Kind] = KINDS,
) -> list[str]:
    """Return what is wrong with the files of a checkpoint, a sentence each; none is good.

    Args:
        kinds: of the files to look at; an export needs no optimizer.
        share: (rank, world_size) hashes every world_size-th file only, so that the ranks of a
            run can verify a large checkpoint together.
    """
    rank, world_size = share
    named = {file.name for file in manifest.files}
    strangers = {p.name for p in directory.glob("*.safetensors")} - named
    found = [f"{name}: is not in the manifest" for name in sorted(strangers)]
    wanted = sorted((f for f in manifest.files if f.kind in kinds), key=lambda file: file.name)
    mine = wanted[rank::world_size]
    with ThreadPoolExecutor(4) as pool:  # one thread hashes 1.2 GB/s, and most disks give more
        faults = list(pool.map(lambda file: _fault(directory / file.name, file), mine))
    return found + [
        f"{file.name}: {fault}" for file, fault in zip(mine, faults, strict=True) if fault
    ]


def _fault(path: Path, file: File) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != file.bytes:
            return f"has {path.stat().st_size} bytes, not {file.bytes}"
        if hash_file(path) != file.sha256:
            return "its bytes have changed since it was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def verify_all(path: Path) -> dict[Path, list[str]]:
    """Return what is wrong with each checkpoint of a run, or with the one at `path`.

    Raises:
        CheckpointError: if there is none.
    """
    return {directory: _problems(directory) for directory in _checkpoints_at(path)}


def newest(path: Path) -> Path:
    """Return the newest checkpoint of a run, or the one at `path`, whether it is sound or not.

    Raises:
        CheckpointError: if there is none.
    """
    return _checkpoints_at(path)[0]


def newest_sound(path: Path, kinds: Collection[Kind] = KINDS) -> tuple[Path, dict[Path, list[str]]]:
    """Return the newest checkpoint of a run that verifies, or the one at `path`.

    Args:
        kinds: of the files that must be sound.

    Returns:
        It, and those that were newer but damaged, with what is wrong with them.

    Raises:
        CheckpointError: if there is none, or all are damaged.
    """
    passed_over: dict[Path, list[str]] = {}
    for directory in _checkpoints_at(path):
        problems = _problems(directory, kinds)
        if not problems:
            return directory, passed_over
        passed_over[directory] = problems
    what = "; ".join(f"{where.name}: {problems[0]}" for where, problems in passed_over.items())
    raise CheckpointError(f"{path}: no checkpoint is whole. {what}.")


def model_of(directory: Path, manifest: Manifest) -> Model:
    """Return the model section that a manifest holds.

    Raises:
        CheckpointError: if it is not one; a manifest may come from a stranger.
    """
    try:
        model = model_from(manifest.model)
    except RecipeError as error:
        raise CheckpointError(f"{directory / MANIFEST}: not a model: {error}") from error
    return model


def _checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoints of a run directory, newest first, or the one that `path` is."""
    if (path / MANIFEST).exists() or _STEP_NAME.fullmatch(path.name):
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory.")
    found = committed(path / CHECKPOINTS)
    if not found and (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: is a model in Hugging Face's format; `mpt import {path} OUT` makes a "
            "checkpoint of it."
        )
    if not found:
        raise CheckpointError(
            f"{path}: no checkpoint there. Name a run directory that has saved one, or a "
            "directory such as runs/tiny/checkpoints/step-00000300."
        )
    return found


def _problems(directory: Path, kinds: Collection[Kind] = KINDS) -> list[str]:
    try:
        return damage(directory, read_manifest(directory), kinds=kinds)
    except CheckpointError as error:
        return [str(error)]


def _seal(content: dict[str, Any]) -> str:
    """Return the hash of a manifest's content, whatever its layout on the page."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_file(entry: dict[str, Any]) -> File:
    file = File(**entry)
    if not _FILE_NAME.fullmatch(str(file.name)):
        raise ValueError(f"{file.name!r} is not a plain file name")
    if file.kind not in KINDS:
        raise ValueError(f"{file.kind!r} is not a kind of file")
    if not isinstance(file.bytes, int) or not isinstance(file.sha256, str):
        raise ValueError(f"{file.name}: its size or hash is not one")
    return file
