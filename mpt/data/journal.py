"""The journal of a dataset that is being written: which shards are finished, and where to go on.

A line of JSON says what the dataset is to be; then a line after each batch that finished a shard.
A line that a kill cut short is dropped, and so is all after a shard that is not what it was.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpt.data.shard import Encoding, ShardInfo
from mpt.storage import atomic_write, fsync_dir, hash_file

JOURNAL_NAME = "journal.jsonl"
HASH = "sha256"


@dataclass(frozen=True)
class Mark:
    """Where a writer goes on: at a batch, some of whose tokens may be in finished shards."""

    batch: int = 0
    documents: int = 0
    """Before the batch; so are the next two."""
    text_bytes: int = 0
    tokens: int = 0
    shards: tuple[ShardInfo, ...] = ()
    """All that are finished."""
    tally: dict[str, Any] | None = None
    """What curation did to the documents before the batch; null where there is none."""


START = Mark()
"""Nothing is finished."""


class Journal:
    """Appends to the journal in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._n_shards = 0

    def begin(self, header: dict[str, Any], mark: Mark | None) -> None:
        """Write the journal anew, durably: what the dataset is to be, and what stands so far."""
        lines = [_line(header)] if mark is None else [_line(header), self._line(mark)]
        atomic_write(self._directory / JOURNAL_NAME, b"".join(lines))

    def append(self, mark: Mark) -> None:
        """Make it durable that shards are finished."""
        fsync_dir(self._directory)  # the names of the shards, before what says they are there
        with (self._directory / JOURNAL_NAME).open("ab") as file:
            file.write(self._line(mark))
            file.flush()
            os.fsync(file.fileno())

    def _line(self, mark: Mark) -> bytes:
        new = mark.shards[self._n_shards :]
        self._n_shards = len(mark.shards)
        shards = [[s.basename, s.file_bytes, s.samples, s.hashes[HASH]] for s in new]
        counts = [mark.batch, mark.documents, mark.text_bytes, mark.tokens, shards]
        return _line(counts if mark.tally is None else [*counts, mark.tally])


def read_journal(directory: Path, header: dict[str, Any], encoding: Encoding) -> Mark | None:
    """Return the last mark up to which all shards are sound: START if none is finished.

    None if there is no journal, or it is of another dataset.
    """
    try:
        lines = (directory / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    if not lines or lines[0] != _line(header):
        return None
    mark = START
    finished: list[ShardInfo] = []
    for line in lines[1:]:
        try:
            batch, documents, text_bytes, tokens, shards, *more = json.loads(line)
        except ValueError:  # cut short
            break
        new = [ShardInfo(n, size, rows, encoding, {HASH: h}) for n, size, rows, h in shards]
        if not all(_sound(directory, shard) for shard in new):
            break
        finished += new
        mark = Mark(batch, documents, text_bytes, tokens, (), *more)
    return replace(mark, shards=tuple(finished))


def drop_unfinished(directory: Path, mark: Mark) -> None:
    """Remove every file that a journal does not speak of."""
    keep = {JOURNAL_NAME, *(shard.basename for shard in mark.shards)}
    for path in directory.iterdir():
        if path.name not in keep:
            path.unlink()


def _sound(directory: Path, shard: ShardInfo) -> bool:
    path = directory / shard.basename
    return path.is_file() and hash_file(path, HASH) == shard.hashes[HASH]


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
