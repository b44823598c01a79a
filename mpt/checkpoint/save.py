"""Saving without stopping: snapshot, write in the background, commit with one rename."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpt.checkpoint.layout import (
    KINDS,
    MANIFEST,
    File,
    Kind,
    Manifest,
    committed,
    leftovers,
    partial_directory,
    shard_name,
    step_directory,
    step_of,
)
from mpt.checkpoint.retain import to_delete
from mpt.checkpoint.snapshot import Snapshot
from mpt.checkpoint.tensors import write_tensors
from mpt.dist import Ranks, any_rank
from mpt.errors import CheckpointError
from mpt.recipe.model import Model
from mpt.state import RunState
from mpt.storage import atomic_write, fsync_dir, hash_file
from mpt.tokenizer import tokenizer_files

Report = Callable[..., None]
"""Called as report("checkpoint", step=..., ...) with what became of a save."""


class SupersededError(Exception):
    """This group of workers was given up: a newer attempt has the run, and alone writes to it."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says about where it comes from."""

    model: Model
    recipe_sha256: str
    tokenizer: Path
    versions: dict[str, str]
    chosen: dict[str, Any] | None = None
    """What `auto` came to."""


class Saver:
    """Writes checkpoints of one run, at most one at a time; closing it waits for the last.

    Every rank calls `save` at the same steps. All ranks write their own files; rank 0 commits.
    """

    def __init__(
        self,
        checkpoints: Path,
        tensors: Mapping[str, Tensor],
        origin: Origin,
        ranks: Ranks,
        *,
        keep: int,
        report: Report,
        attempt: int,
        newer: Callable[[], int | None],
    ) -> None:
        """Take the memory that saves need.

        Args:
            keep: the newest checkpoints that retention leaves.
            attempt: that these workers belong to.
            newer: returns the number of a later attempt, once there is one.
        """
        self._checkpoints = checkpoints
        self._tensors = tensors
        self._origin = origin
        self._ranks = ranks
        self._keep = keep
        self._report = report
        self._attempt = attempt
        self._newer = newer
        # Now, not at the first save: memory that is missing should be missed at once.
        self._snapshot = Snapshot(tensors, ranks.host_mesh)
        self._writing: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        # The background thread talks to its peers over a group of its own: on the training
        # group its messages would mix with the gradients'.
        self._group = dist.new_group(backend="gloo")

    def save(self, state: RunState) -> None:
        """Copy the state and return; it is written while training goes on.

        A save that is still being written is waited for first. One that failed has been
        reported, and is not raised here: training goes on with the last good checkpoint.

        Raises:
            SupersededError: on every rank, if there is a newer attempt.
        """
        self.wait()
        self._stand_down_if_superseded()
        # What rank 0 sees counts: another machine may see it later.
        there = self._ranks.is_first and os.path.exists(
            step_directory(self._checkpoints, state.step)
        )
        if any_rank(there):
            return
        began = time.perf_counter()
        tensors = self._snapshot.take(self._tensors)
        blocked_s = time.perf_counter() - began
        self._writing = threading.Thread(
            target=self._write_and_report, args=(tensors, state, blocked_s), name="mpt-save"
        )
        self._writing.start()

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def close(self) -> None:
        """Wait for the last save.

        Raises:
            CheckpointError: if that one failed, so that a run never ends with lost work quietly.
            SupersededError: on every rank, if there is a newer attempt.
        """
        self.wait()
        self._stand_down_if_superseded()
        if self._failure is not None:
            raise self._failure

    def _stand_down_if_superseded(self) -> None:
        newer: int | None = None
        if self._ranks.is_first:
            with suppress(OSError):  # not known is no reason to end; a commit asks again
                newer = self._newer()
        if any_rank(newer is not None):
            raise SupersededError(f"attempt {self._attempt} was given up; a newer one has the run.")

    def _write_and_report(
        self, tensors: dict[str, Tensor], state: RunState, blocked: float
    ) -> None:
        began = time.perf_counter()
        try:
            directory = self._write(tensors, state)
        except Exception as error:  # noqa: BLE001 - a thread's boundary: nobody is above to hear it
            why = str(error) if isinstance(error, CheckpointError) else repr(error)
            self._failure = CheckpointError(f"the save of step {state.step} failed: {why}")
            self._report("checkpoint_failed", step=state.step, why=str(self._failure))
            return
        self._failure = None
        self._report(
            "checkpoint",
            step=state.step,
            path=str(directory),
            blocked_s=round(blocked, 4),
            write_s=round(time.perf_counter() - began, 3),
        )

    def _write(self, tensors: dict[str, Tensor], state: RunState) -> Path:
        """Write, hash and commit. Every rank passes the same collectives, failed or not."""
        final = step_directory(self._checkpoints, state.step)
        partial = partial_directory(self._checkpoints, state.step, self._attempt)
        self._together(lambda: self._if_first(self._make_place, partial))
        written = write_tensors(tensors, partial, self._group)
        entries = self._together(lambda: self._finish_files(written, partial))
        table = self._gather(entries)
        self._together(lambda: self._if_first(self._commit, partial, final, state, table))
        if self._ranks.is_first:
            self._retire()
        return final

    def _make_place(self, partial: Path) -> None:
        # What a save that failed for want of space has left would be in the way of this one.
        self._sweep()
        partial.mkdir(parents=True)

    def _finish_files(self, written: dict[Kind, Path], partial: Path) -> list[File]:
        """Give this rank's files their names, make them durable, and hash them."""
        done = []
        for kind, path in written.items():
            name = shard_name(kind, self._ranks.rank, self._ranks.world_size)
            final = path.rename(partial / name)
            with final.open("rb") as file:
                os.fsync(file.fileno())
            done.append(File(name, kind, final.stat().st_size, hash_file(final)))
        return done

    def _gather(self, files: list[File]) -> list[File]:
        """Bring every rank's sizes and hashes together, as numbers: nothing is pickled."""
        row_bytes = 8 + 32  # a size, and a SHA-256
        mine = torch.zeros(len(KINDS), row_bytes, dtype=torch.uint8)
        for file in files:
            row = file.bytes.to_bytes(8, "little") + bytes.fromhex(file.sha256)
            mine[KINDS.index(file.kind)] = torch.frombuffer(bytearray(row), dtype=torch.uint8)
        parts = [torch.zeros_like(mine) for _ in range(self._ranks.world_size)]
        dist.all_gather(parts, mine, group=self._group)
        table = []
        for rank, part in enumerate(parts):
            for kind, numbers in zip(KINDS, part.tolist(), strict=True):
                size = int.from_bytes(bytes(numbers[:8]), "little")
                if size:
                    name = shard_name(kind, rank, self._ranks.world_size)
                    table.append(File(name, kind, size, bytes(numbers[8:]).hex()))
        return table

    def _commit(self, partial: Path, final: Path, state: RunState, table: list[File]) -> None:
        for name, content in tokenizer_files(self._origin.tokenizer).items():
            atomic_write(partial / name, content)
            table.append(File(name, "tokenizer", len(content), hash_file(partial / name)))
        manifest = Manifest(
            state,
            world_size=self._ranks.world_size,
            model=asdict(self._origin.model),
            recipe_sha256=self._origin.recipe_sha256,
            versions=self._origin.versions,
            files=tuple(table),
            chosen=self._origin.chosen,
        )
        atomic_write(partial / MANIFEST, manifest.to_json())
        if (newer := self._newer()) is not None:
            raise SupersededError(f"attempt {newer} has the run, this one is {self._attempt}")
        partial.rename(final)
        fsync_dir(final.parent)

    def _retire(self) -> None:
        """Delete what retention gives up. A failure costs disk space, never the run."""
        try:
            have = {step_of(path): path for path in committed(self._checkpoints)}
            for step in to_delete(have, self._keep):
                # Renamed first, so that one half deleted is never taken for a checkpoint.
                have[step].rename(partial_directory(self._checkpoints, step, self._attempt))
        except OSError as error:
            self._report("warning", why=f"{error.filename}: cannot be deleted: {error.strerror}")
        self._sweep()

    def _sweep(self) -> None:
        """Delete what is half-written or retired. What a later attempt writes is left alone."""
        try:
            for leftover in leftovers(self._checkpoints, self._attempt):
                shutil.rmtree(leftover)
        except OSError as error:
            self._report("warning", why=f"{error.filename}: cannot be deleted: {error.strerror}")

    def _if_first(self, work: Callable[..., None], *args: Any) -> None:
        if self._ranks.is_first:
            work(*args)

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do this rank's part; raise on all ranks if any failed, so that none waits for ever."""
        failure: Exception | None = None
        result = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised below, on every rank
            failure = error
        if any_rank(failure is not None, self._group):
            raise CheckpointError(
                repr(failure) if failure else "another rank could not write its part"
            )
        return result
