"""Documents' tokens packed into samples, and samples into the shards of a new dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.data.about import About
from mpt.data.curate.account import CURATION_NAME, account, counts_of
from mpt.data.curate.tally import Tally
from mpt.data.descriptions import ABOUT_NAME
from mpt.data.encode import Encoded
from mpt.data.hashes import content_hash
from mpt.data.index import INDEX_NAME, format_index
from mpt.data.journal import START, Journal, Mark
from mpt.data.reader import Shard
from mpt.data.shard import LIMIT_BYTES, Encoding, ShardInfo, write_shard
from mpt.errors import DataError
from mpt.storage import atomic_write

COUNTED_IDS = 1 << 20
"""At a time: counting takes 8 bytes for each."""


class Packer:
    """Packs tokens into samples, counts, and keeps the journal."""

    def __init__(
        self, writer: DatasetWriter, about: About, journal: Journal, mark: Mark = START
    ) -> None:
        """Go on from a mark in the journal, with a writer that has its shards."""
        self.about = replace(
            about, documents=mark.documents, text_bytes=mark.text_bytes, tokens=mark.tokens
        )
        self.next_batch = mark.batch
        """Batches before it are not to be added again."""
        self._tally = Tally(**mark.tally or {}) if about.curation is not None else None
        self._writer = writer
        self._journal = journal
        self._rest: NDArray[Any] = np.empty(0, writer.dtype)
        self._finished = writer.n_written - mark.tokens  # of the next batch; not to be written

    @property
    def has_shards(self) -> bool:
        """Whether something is on the disk that need not be made again."""
        return bool(self._writer.shards)

    def add(self, batch: int, encoded: Encoded) -> None:
        """Take a batch's documents on, and note in the journal if that finished a shard."""
        before, tally, n_shards = self.about, self._tally, len(self._writer.shards)
        tokens = encoded.tokens[self._finished :]
        self._finished = 0
        stream = np.concatenate([self._rest, tokens])
        length = self._writer.sample_length
        whole = len(stream) // length * length
        self._writer.write(stream[:whole].reshape(-1, length))
        self._rest = stream[whole:]
        self.about = replace(
            before,
            documents=before.documents + encoded.documents,
            tokens=before.tokens + len(encoded.tokens),
            dropped_tokens=len(self._rest),
            text_bytes=before.text_bytes + encoded.text_bytes,
        )
        if tally is not None and encoded.tally is not None:
            self._tally = tally.plus(encoded.tally)
        if len(self._writer.shards) > n_shards:
            counts = (before.documents, before.text_bytes, before.tokens)
            so_far = None if tally is None else tally.as_json()
            self._journal.append(Mark(batch, *counts, tuple(self._writer.shards), so_far))

    def finish(self) -> None:
        """Complete the dataset; the tokens that did not fill a sample are dropped.

        Raises:
            DataError: they did not fill a single one.
        """
        about = self.about
        if about.tokens == about.dropped_tokens:
            remedy = "give more text, or lower model.max_seq_len."
            if about.split == "eval":
                remedy = f"raise prepare.eval_fraction above {about.eval_fraction}, or {remedy}"
            if self._tally is not None and (came := self._tally.came[0]) > about.documents:
                counts = self._tally.dropped
                most = max(counts, key=lambda rule: counts[rule][0])
                dropped = f"{came - about.documents} of {came}, most of them by {most}"
                remedy = f"the rules of prepare.curate dropped {dropped}; {remedy}"
            raise DataError(
                f"{about.source}: {about.documents} documents for {about.split} make {about.tokens}"
                f" tokens, not one sample of {self._writer.sample_length}; {remedy}"
            )
        if about.curation is None or self._tally is None:
            self._writer.finish(about)
            return
        curation = account(about.curation, self._tally, self._writer.id_counts)
        about = replace(about, curation=about.curation | counts_of(self._tally))
        self._writer.finish(about, {CURATION_NAME: curation})


class DatasetWriter:
    """Writes samples into shards of a directory, which is no dataset until `finish`."""

    def __init__(
        self,
        path: Path,
        encoding: Encoding,
        shard_bytes: int,
        finished: Sequence[ShardInfo] = (),
        *,
        n_ids: int = 0,
    ) -> None:
        """Write to a directory that holds the finished shards and no others.

        Args:
            n_ids: count how often each of so many ids is written; 0 counts none.
        """
        per_shard = samples_per_shard(encoding, shard_bytes)
        assert encoding.sample_length is not None
        self.sample_length = encoding.sample_length
        self.dtype = encoding.file_dtype
        self.shards = list(finished)
        self.id_counts = np.zeros(n_ids, np.int64)
        """Of the samples in all shards."""
        self._path = path
        self._encoding = encoding
        self._shard_bytes = shard_bytes
        self._per_shard = per_shard
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = 0
        for info in self.shards if n_ids else ():
            shard = Shard(path / info.basename, info)
            samples = np.empty((info.samples, self.sample_length), self.dtype)
            shard.read(rows := np.arange(info.samples), samples, rows)
            self._count(samples)

    @property
    def n_written(self) -> int:
        """Tokens in finished shards."""
        return sum(shard.samples for shard in self.shards) * self.sample_length

    def write(self, samples: NDArray[Any]) -> None:
        """Take samples (n, S) on; full shards go to disk."""
        while len(samples):
            head = samples[: self._per_shard - self._n_waiting]
            samples = samples[len(head) :]
            self._waiting.append(head.astype(self.dtype))
            self._n_waiting += len(head)
            if self._n_waiting == self._per_shard:
                self._flush()

    def finish(self, about: About, more: Mapping[str, Any] | None = None) -> None:
        """Write the last shard, then what the dataset is about, then the index.

        Args:
            more: other files, by name, what they hold as JSON.
        """
        if self._n_waiting:
            self._flush()
        about = replace(about, content_sha256=content_hash(self.shards) or "")
        for name, content in ({**(more or {}), ABOUT_NAME: asdict(about)}).items():
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            atomic_write(self._path / name, text)
        atomic_write(self._path / INDEX_NAME, format_index(self.shards, self._shard_bytes))

    def _flush(self) -> None:
        path = self._path / f"shard.{len(self.shards):05d}.mds"
        samples = np.concatenate(self._waiting)
        info = write_shard(path, samples, self._encoding, size_limit=self._shard_bytes)
        self._count(samples)
        self.shards.append(info)
        self._waiting, self._n_waiting = [], 0

    def _count(self, samples: NDArray[Any]) -> None:
        if not len(self.id_counts):
            return
        ids = samples.ravel()
        for start in range(0, len(ids), COUNTED_IDS):
            part = ids[start : start + COUNTED_IDS]
            self.id_counts += np.bincount(part, minlength=len(self.id_counts))


def samples_per_shard(encoding: Encoding, shard_bytes: int) -> int:
    """Return how many samples make a full shard; DataError if no shard may be so large."""
    if shard_bytes > LIMIT_BYTES:
        raise DataError(
            f"prepare.shard_bytes: {shard_bytes} is too large; the most is {LIMIT_BYTES}."
        )
    assert encoding.sample_bytes is not None
    return max(1, shard_bytes // (encoding.sample_bytes + 4))
