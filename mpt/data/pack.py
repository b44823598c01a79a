"""Documents' tokens packed into samples, and samples into the shards of a new dataset."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.data.dataset import About
from mpt.data.descriptions import ABOUT_NAME
from mpt.data.index import INDEX_NAME, format_index
from mpt.data.shard import LIMIT_BYTES, Encoding, ShardInfo, write_shard
from mpt.errors import DataError
from mpt.storage import atomic_write


class Packer:
    """Packs tokens into samples, and counts."""

    def __init__(self, writer: DatasetWriter, about: About) -> None:
        self.about = about
        self._writer = writer
        self._rest = np.empty(0, np.uint32)

    def add(self, encoded: list[list[int]], text_bytes: int) -> None:
        """Take documents on, an end-of-document token after each."""
        ends = [self.about.eod_id]
        tokens = np.fromiter(chain.from_iterable(chain(ids, ends) for ids in encoded), np.uint32)
        stream = np.concatenate([self._rest, tokens])
        length = self._writer.sample_length
        whole = len(stream) // length * length
        self._writer.write(stream[:whole].reshape(-1, length))
        self._rest = stream[whole:]
        self.about = replace(
            self.about,
            documents=self.about.documents + len(encoded),
            tokens=self.about.tokens + len(tokens),
            dropped_tokens=len(stream) - whole,
            text_bytes=self.about.text_bytes + text_bytes,
        )

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
            raise DataError(
                f"{about.source}: {about.documents} documents for {about.split} make {about.tokens}"
                f" tokens, not one sample of {self._writer.sample_length}; {remedy}"
            )
        self._writer.finish(about)


class DatasetWriter:
    """Writes samples into shards of a new directory, which is no dataset until `finish`."""

    def __init__(self, path: Path, encoding: Encoding, shard_bytes: int) -> None:
        """Make the directory; its parent exists and it does not."""
        if shard_bytes > LIMIT_BYTES:
            raise DataError(
                f"prepare.shard_bytes: {shard_bytes} is too large; the most is {LIMIT_BYTES}."
            )
        assert encoding.sample_bytes is not None
        assert encoding.sample_length is not None
        path.mkdir()
        self.sample_length = encoding.sample_length
        self._path = path
        self._encoding = encoding
        self._shard_bytes = shard_bytes
        self._per_shard = max(1, shard_bytes // (encoding.sample_bytes + 4))
        self._shards: list[ShardInfo] = []
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = 0

    def write(self, samples: NDArray[Any]) -> None:
        """Take samples (n, S) on; full shards go to disk."""
        while len(samples):
            head = samples[: self._per_shard - self._n_waiting]
            samples = samples[len(head) :]
            self._waiting.append(head.astype(self._encoding.file_dtype))
            self._n_waiting += len(head)
            if self._n_waiting == self._per_shard:
                self._flush()

    def finish(self, about: About) -> None:
        """Write the last shard, then what the dataset is about, then the index."""
        if self._n_waiting:
            self._flush()
        text = json.dumps(asdict(about), indent=2, sort_keys=True) + "\n"
        atomic_write(self._path / ABOUT_NAME, text)
        atomic_write(self._path / INDEX_NAME, format_index(self._shards, self._shard_bytes))

    def _flush(self) -> None:
        path = self._path / f"shard.{len(self._shards):05d}.mds"
        samples = np.concatenate(self._waiting)
        info = write_shard(path, samples, self._encoding, size_limit=self._shard_bytes)
        self._shards.append(info)
        self._waiting, self._n_waiting = [], 0
