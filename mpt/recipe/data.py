"""The `tokenizer:`, `data:` and `prepare:` sections: what is read, and how it comes to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from mpt.recipe.curate import Curate
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


Measure = Literal["weight", "tokens", "repeats"]
"""What a stream's share of the samples may be given by."""

_LAST_STEP = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Stream:
    path: str
    """A directory of MDS shards with an index.json, or its URL: `https://`, `s3://`, `hf://`."""
    weight: float | None = None
    """Share of the samples, relative to the other streams. A stream that has none of these three
    keys has weight 1; all streams of a recipe use the same key."""
    tokens: int | None = None
    """Instead: tokens that the run shall read of it."""
    repeats: float | None = None
    """Instead: how often the run shall read the whole of it."""

    @property
    def measure(self) -> Measure:
        """The key that its share is given by."""
        if self.tokens is not None:
            return "tokens"
        return "weight" if self.repeats is None else "repeats"

    def problems(self, key: str, *, may_be_zero: bool) -> Iterator[Problem]:
        """Yield what is wrong with one stream.

        Args:
            may_be_zero: a curriculum may give it a weight later on.
        """
        yield from _empty(f"{key}.path", self.path)
        given = [name for name in get_args(Measure) if getattr(self, name) is not None]
        for name in given[1:]:
            yield Problem(f"{key}.{name}", f"stands beside {given[0]}.", "give one of the two.")
        for name in given:
            value = getattr(self, name)
            most = {"weight": float("inf"), "tokens": 1 << 62, "repeats": 1e9}[name]
            if not 0.0 < value < most and not (may_be_zero and value == 0):
                yield Problem(f"{key}.{name}", f"{value} is not a positive number.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A mixture that takes the place of the one before."""

    from_step: int
    """Steps after which it holds, to the sample: from position from_step x
    train.global_batch_size of the data on. Where data was passed over, that is so much earlier."""
    weights: dict[str, float]
    """Share of the samples of every stream, by name; 0 leaves it out, and it goes on from where it
    was when it comes back."""


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
    """Named sources, mixed by weight, tokens or repeats; the same mix at any world size."""
    curriculum: tuple[Phase, ...] = ()
    """Other mixtures for later steps, in order; until the first, the streams' own weights hold."""
    eval: EvalData | None = None
    """Held-out samples; null trains without evaluation."""
    shuffle: bool = True
    """Shuffle shards, and samples within windows of shards, anew each epoch."""
    verify: bool = True
    """Check each shard against its recorded hash before the first step. Remote ones are checked
    when they are fetched, always.
    """
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a sample that has a token id outside the vocabulary, or another length:
    `error` ends the run, `skip` gives it no part in the loss, and says which it was."""
    bad_sample_budget: int = 100
    """Samples that a run may skip, over all its restarts, before it ends all the same."""
    cache: Cache = field(default_factory=Cache)

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if not self.streams:
            yield Problem("data.streams", "no stream is named.", "name at least one.")
        if self.bad_sample_budget < 0:
            yield Problem("data.bad_sample_budget", f"{self.bad_sample_budget} is negative.")
        if self.eval is not None:
            yield from _empty("data.eval.path", self.eval.path)
        yield from self.cache.problems()
        for name, stream in self.streams.items():
            yield from stream.problems(f"data.streams.{name}", may_be_zero=bool(self.curriculum))
            if name in ("eval", "tokenizer"):  # as records of a run call those
                yield Problem(f"data.streams.{name}", "is taken.", "give it another name.")
        measures = {stream.measure for stream in self.streams.values()}
        if len(measures) > 1:
            for name, stream in self.streams.items():
                yield Problem(
                    f"data.streams.{name}",
                    f"its share is given by {stream.measure}, but others' by "
                    f"{' and '.join(sorted(measures - {stream.measure}))}.",
                    "use the same key for all streams.",
                )
        elif self.curriculum and measures != {"weight"}:
            yield Problem(
                "data.curriculum",
                f"is by weight, but the streams are by {measures.pop()}.",
                "give the streams weights.",
            )
        else:
            yield from self._curriculum_problems()

    def _curriculum_problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the phases, each by itself and as a sequence."""
        first = {name: stream.weight for name, stream in self.streams.items()}
        if self.curriculum and first and not any(w is None or w > 0 for w in first.values()):
            yield Problem("data.streams", "all weights are 0.", "begin with something.")
        previous = 0
        for number, phase in enumerate(self.curriculum):
            key = f"data.curriculum[{number}]"
            if not previous < phase.from_step < _LAST_STEP:
                yield Problem(
                    f"{key}.from_step",
                    f"{phase.from_step} is not after {previous}, where the one before begins.",
                )
            previous = phase.from_step
            for name in sorted(self.streams.keys() - phase.weights.keys()):
                yield Problem(f"{key}.weights", f"{name} is missing.", "0 leaves a stream out.")
            for name, weight in phase.weights.items():
                if name not in self.streams:
                    yield Problem(f"{key}.weights.{name}", "is no stream of data.streams.")
                elif not 0.0 <= weight < float("inf"):
                    yield Problem(f"{key}.weights.{name}", f"{weight} is negative or infinite.")
            if not any(phase.weights.values()):
                yield Problem(f"{key}.weights", "all are 0.", "one must be positive.")
        for name, initial in first.items():
            later = (phase.weights.get(name, 0.0) for phase in self.curriculum)
            if self.curriculum and initial == 0 and not any(later):
                yield Problem(f"data.streams.{name}.weight", "is 0 in every phase.", "drop it.")


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
    curate: Curate | None = None
    """Rules by which documents are dropped or masked; null keeps all as they are."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        yield from _empty("prepare.source", self.source.removeprefix(DELTA_PREFIX))
        if self.delta is not None:
            yield from self.delta.problems()
        if not 0.0 <= self.eval_fraction < 1.0:
            yield Problem("prepare.eval_fraction", f"{self.eval_fraction} is not in [0, 1).")
        if self.shard_bytes < 1:
            yield Problem("prepare.shard_bytes", f"{self.shard_bytes} is not a positive count.")
        if self.curate is not None:
            yield from self.curate.problems(self.eval_fraction)


def _empty(key: str, path: str) -> Iterator[Problem]:
    """Yield a problem if the path is empty: it would mean the current directory."""
    if not path:
        yield Problem(key, "is an empty path.")
