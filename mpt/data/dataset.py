"""A dataset: a directory of shards, its index.json, and how it came to be in dataset.json."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt.data.index import read_index
from mpt.data.shard import Shard, ShardInfo
from mpt.errors import DataError
from mpt.recipe.model import Model
from mpt.recipe.problem import Problem
from mpt.recipe.recipe import Recipe
from mpt.storage import hash_file, read_json
from mpt.tokenizer import Tokenizer, load_tokenizer

ABOUT_NAME = "dataset.json"
LIMIT_ABOUT_BYTES = 1 << 20
MAX_OPEN_SHARDS = 64
"""Maps kept open: a few shuffle windows, far below what a process may map."""


@dataclass(frozen=True, kw_only=True)
class About:
    """How a dataset came to be: the content of dataset.json."""

    tokenizer_sha256: str
    vocab_size: int
    """Of the tokenizer."""
    eod_id: int
    source: str
    text_key: str
    split: str
    """train or eval."""
    eval_fraction: float
    """Share of the source's documents that went to eval; by hash, so no text is in both."""
    created_by: str
    documents: int = 0
    tokens: int = 0
    """Of all documents, one end-of-document token each included."""
    dropped_tokens: int = 0
    """The last of them, which did not fill a sample."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""

    @property
    def tokens_per_byte(self) -> float:
        """Times nats per token, over ln 2, are bits per byte."""
        return self.tokens / self.text_bytes


@dataclass(frozen=True, eq=False)
class Dataset:
    """Packed samples on disk. Shards are mapped when first read."""

    path: Path
    shards: tuple[ShardInfo, ...]
    sample_length: int
    """Tokens per sample."""
    about: About | None
    """Null where others made the dataset."""
    _shard: Callable[[int], Shard] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_shard", lru_cache(maxsize=MAX_OPEN_SHARDS)(self.open_shard))

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples in each shard, int64 (shards,)."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens per UTF-8 byte of text, for bits per byte; null where unknown."""
        return self.about.tokens_per_byte if self.about and self.about.text_bytes else None

    def rows(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return samples, int64 (n, sample_length), in the order asked for.

        Args:
            shards: (n,), which shard each is in.
            rows: (n,), which sample of that shard it is.

        Raises:
            DataError: a shard is missing or corrupt, or a sample of another length.
        """
        result = np.empty((len(rows), self.sample_length), np.int64)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            result[mine] = self._shard(int(shard)).rows(rows[mine], self.sample_length)
        return result

    def open_shard(self, number: int) -> Shard:
        """Map one shard and check its structure, but not its hash."""
        info = self.shards[number]
        path = self.path / info.basename
        if path.is_symlink() and not path.resolve().is_relative_to(self.path.resolve()):
            raise DataError(f"{path}: a link that leads out of the dataset; put the file here.")
        return Shard(path, info)


def open_dataset(path: Path) -> Dataset:
    """Read the index of a dataset.

    Raises:
        DataError: no complete dataset there, or one that cannot be read.
    """
    shards = read_index(path)
    filled = next((i for i, shard in enumerate(shards) if shard.samples), None)
    if filled is None:
        raise DataError(f"{path}: a dataset without samples.")
    lengths = {shard.encoding.sample_length for shard in shards}
    if len(lengths) > 1:
        raise DataError(f"{path}: its shards have samples of different lengths: {lengths}.")
    dataset = Dataset(path, shards, lengths.pop() or 0, _read_about(path / ABOUT_NAME))
    if dataset.sample_length:
        return dataset
    first = len(dataset.open_shard(filled).sample(0))
    return Dataset(path, shards, first, dataset.about)


def verify(dataset: Dataset, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """Read every shard, and return a sentence on each that is missing, truncated or corrupt.

    Args:
        rank, world_size: look at this rank's part of the shards only.
    """
    faults = []
    for number in range(rank, len(dataset.shards), world_size):
        try:
            dataset.open_shard(number)
            _check_hashes(dataset.path, dataset.shards[number])
        except DataError as fault:
            faults.append(str(fault))
    return faults


def checkable_hashes(shard: ShardInfo) -> list[str]:
    """Return the recorded hash algorithms that every Python has; others cannot be checked."""
    return [
        name
        for name in shard.hashes
        if name in hashlib.algorithms_guaranteed and not name.startswith("shake")
    ]


def check_tokenizer(tokenizer: Tokenizer, model: Model) -> None:
    """Refuse a tokenizer with more ids than the model has rows; DataError says what to set."""
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size is "
            f"{model.vocab_size}; set that to {tokenizer.vocab_size} or more."
        )


def tokenizer_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong between a recipe's model and its tokenizer, if that is there yet."""
    path = Path(recipe.tokenizer.path)
    if not path.is_file():
        return
    try:
        n_ids = load_tokenizer(path).vocab_size
    except DataError as error:
        yield Problem("tokenizer.path", str(error))
        return
    if n_ids > recipe.model.vocab_size:
        yield Problem(
            "model.vocab_size",
            f"{recipe.model.vocab_size} rows do not cover the {n_ids} ids of {path}",
            f"use {n_ids} or more; the next multiple of 128 is {-(-n_ids // 128) * 128}.",
        )


def check_dataset(dataset: Dataset, model: Model, tokenizer: Tokenizer) -> None:
    """Refuse a dataset that was made for another model or another tokenizer.

    Raises:
        DataError: says both values, and what to change.
    """
    check_tokenizer(tokenizer, model)
    path, about = dataset.path, dataset.about
    if dataset.sample_length != model.max_seq_len:
        raise DataError(
            f"{path}: samples of {dataset.sample_length} tokens, but model.max_seq_len is "
            f"{model.max_seq_len}; set that to {dataset.sample_length}, or prepare another dataset."
        )
    if about is not None and about.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{path}: made with the tokenizer of sha256 {about.tokenizer_sha256:.12}..., but the "
            f"recipe's is {tokenizer.sha256:.12}...; name that one, or prepare another dataset."
        )


def _check_hashes(directory: Path, shard: ShardInfo) -> None:
    """Compare a file with those of its recorded digests that can be computed here."""
    path = directory / shard.basename
    for name in checkable_hashes(shard):
        seen, wanted = hash_file(path, name), shard.hashes[name]
        if seen != wanted:
            raise DataError(
                f"{path}: corrupt shard: its {name} is {seen:.16}..., the index says "
                f"{wanted[:16]!r}...; prepare the dataset again, or fetch this file again."
            )


def _read_about(path: Path) -> About | None:
    if not path.exists():
        return None
    about = read_json(path, limit_bytes=LIMIT_ABOUT_BYTES)
    if not isinstance(about, dict):
        raise DataError(f"{path}: not an object.")
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}
    for entry in fields(About):
        if type(about.get(entry.name)) not in kinds[str(entry.type)]:
            raise DataError(f"{path}: {entry.name}: {about.get(entry.name)!r:.80} cannot be.")
    return About(**{entry.name: about[entry.name] for entry in fields(About)})
