"""The `tokenizer:`, `data:` and `prepare:` sections: what is read, and how it comes to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mpt.recipe.delta import DELTA_PREFIX, Delta
from mpt.recipe.problem import Problem

PYTHON_STDLIB = "python-stdlib"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    path: str
    """A sentencepiece `.model` file."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        yield from _empty("tokenizer.path", self.path)


@dataclass(frozen=True, kw_only=True)
class Stream:
    path: str
    """A directory of MDS shards with an index.json, or its URL: `https://`, `s3://`, `hf://`."""
    weight: float = 1.0
    """Share of the samples, relative to the other streams."""


@dataclass(frozen=True, kw_only=True)
class EvalData:
    path: str
    """A directory of MDS shards that training never reads, or its URL."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where each node keeps shards of remote streams, and shards it has decompressed."""

    dir: str = "~/.cache/mpt"
    """On a disk of the node: the ranks of a node share it by file locks."""
    limit_bytes: int | None = None
    """When there are more bytes, the shards used longest ago go; none that is in use. Null: never.
    """
    timeout_s: float = 20.0
    """A server that is silent for so long has failed; the request is made again."""
    deadline_s: float = 45.0
    """For one shard, all attempts together; then training stops with an error. Below
    launch.hang.min_s, or a step that waits for data would be taken for one that hangs."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        yield from _empty("data.cache.dir", self.dir)
        if "://" in self.dir:
            yield Problem("data.cache.dir", f"{self.dir!r} is a URL.", "name a local directory.")
        for key in ("limit_bytes", "timeout_s", "deadline_s"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                yield Problem(f"data.cache.{key}", f"{value} is not positive.")
        if self.timeout_s == float("inf"):
            yield Problem("data.cache.timeout_s", "is infinite.", "use 20.")


@dataclass(frozen=True, kw_only=True)
class Data:
    streams: dict[str, Stream]
    """Named sources, mixed by weight."""
    eval: EvalData | None = None
    """Held-out samples; null trains without evaluation."""
    shuffle: bool = True
    """Shuffle shards, and samples within windows of shards, anew each epoch."""
    verify: bool = True
    """Check each shard against its recorded hash before the first step. Remote ones are checked
    when they are fetched, always.
    """
    cache: Cache = field(default_factory=Cache)

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if not self.streams:
            yield Problem("data.streams", "no stream is named.", "name at least one.")
        if self.eval is not None:
            yield from _empty("data.eval.path", self.eval.path)
        yield from self.cache.problems()
        for name, stream in self.streams.items():
            yield from _empty(f"data.streams.{name}.path", stream.path)
            if not 0.0 < stream.weight < float("inf"):
                yield Problem(
                    f"data.streams.{name}.weight", f"{stream.weight} is not a positive number."
                )


@dataclass(frozen=True, kw_only=True)
class Prepare:
    source: str
    """`python-stdlib`, or a path, glob or URL of text files, `*.jsonl[.gz|.zst]`, `*.parquet`, a
    Hugging Face dataset on disk, an MDS dataset of texts, or a Delta Lake table."""
    delta: Delta | None = None
    """Version and rows of a Delta Lake table; null takes the newest, and all."""
    eval_fraction: float = 0.01
    """Share of the documents that goes to `data.eval` and is never trained on."""
    text_key: str = "text"
    """The key in a JSON line, or the column, that holds the text."""
    shard_bytes: int = 1 << 26
    """Shards are cut at about this many bytes of tokens."""
    tokenizer: Literal["train", "existing"] = "train"
    """`train` makes a tokenizer of model.vocab_size when tokenizer.path is missing."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        yield from _empty("prepare.source", self.source.removeprefix(DELTA_PREFIX))
        if self.delta is not None:
            yield from self.delta.problems()
        if not 0.0 <= self.eval_fraction < 1.0:
            yield Problem("prepare.eval_fraction", f"{self.eval_fraction} is not in [0, 1).")
        if self.shard_bytes < 1:
            yield Problem("prepare.shard_bytes", f"{self.shard_bytes} is not a positive count.")


def _empty(key: str, path: str) -> Iterator[Problem]:
    """Yield a problem if the path is empty: it would mean the current directory."""
    if not path:
        yield Problem(key, "is an empty path.")
