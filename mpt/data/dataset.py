"""A dataset: a directory of shards, its index.json, and how it came to be in dataset.json."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.data.about import About, parse_about
from mpt.data.descriptions import ABOUT_NAME, read_descriptions
from mpt.data.hashes import content_hash, wrong_hash
from mpt.data.index import INDEX_NAME, parse_index
from mpt.data.order import WINDOW_SHARDS
from mpt.data.reader import Shard
from mpt.data.shard import ShardInfo, common_dtype
from mpt.data.store import Store, local_file
from mpt.errors import DataError
from mpt.recipe.data import Cache
from mpt.recipe.model import Model
from mpt.recipe.problem import Problem
from mpt.recipe.recipe import Recipe
from mpt.storage import is_url, without_secrets
from mpt.tokenizer import Tokenizer, load_tokenizer

MAX_OPEN_SHARDS = 64
"""Files kept open: a few shuffle windows. To open one costs no more than to read ten samples."""
MAX_OPEN_COPIES = WINDOW_SHARDS
"""Of copies, which are not evicted while they are open: what a batch reads, and no more."""
SHARE_OF_FILES = 8
"""Of the files that a process may have open, a dataset takes one part of so many at most."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Packed samples. Shards are opened when first read, after they were fetched if need be."""

    location: str
    """A directory, or a URL without its secrets."""
    shards: tuple[ShardInfo, ...]
    sample_length: int
    """Tokens per sample."""
    about: About | None
    """Null where others made the dataset."""
    index_sha256: str
    store: Store
    """Where copies are of the shards that cannot be read where they lie."""
    dtype: np.dtype[Any] = field(init=False)
    """Of samples: an integer type that holds those of every shard."""
    _shard: Callable[[int], Shard] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        dtype = common_dtype(shard.encoding.file_dtype for shard in self.shards)
        object.__setattr__(self, "dtype", dtype)
        n_open = MAX_OPEN_COPIES if self.needs_copies else MAX_OPEN_SHARDS
        may_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE_OF_FILES
        n_open = min(n_open, max(1, may_open))
        object.__setattr__(self, "_shard", lru_cache(maxsize=n_open)(self.open_shard))

    @property
    def path(self) -> Path:
        """The directory of a dataset that is not remote."""
        return Path(self.location)

    @property
    def is_remote(self) -> bool:
        return is_url(self.location)

    @property
    def needs_copies(self) -> bool:
        """Whether any shard cannot be read where it lies."""
        return self.is_remote or any(shard.zipped for shard in self.shards)

    def needs_copy(self, number: int) -> bool:
        """Whether this shard cannot be read where it lies."""
        return self.is_remote or self.shards[number].zipped is not None

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

    def rows(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return samples, (n, sample_length) of `dtype`, in the order asked for.

        Args:
            shards: (n,), which shard each is in.
            rows: (n,), which sample of that shard it is.

        Raises:
            DataError: a shard is missing or corrupt, or a sample of another length.
        """
        samples = np.empty((len(rows), self.sample_length), self.dtype)
        by_shard = np.argsort(shards, kind="stable")  # so that each shard is opened once
        first = np.flatnonzero(np.diff(shards[by_shard], prepend=-1))
        for begin, end in pairwise([*first.tolist(), len(shards)]):
            places = by_shard[begin:end]
            self._shard(int(shards[places[0]])).read(rows[places], samples, places)
        return samples

    def open_shard(self, number: int) -> Shard:
        """Open one shard and check its structure; its hash only where a copy is made of it."""
        info = self.shards[number]
        if self.needs_copy(number):
            return Shard(self.store.name(info), info, self.store.open_copy(info))
        return Shard(local_file(self.path, info.basename), info)

    def fetch(self, number: int) -> None:
        """See to it that a copy is there, unless another process is making it: BusyError."""
        self.store.open_copy(self.shards[number], wait=False).close()

    def name_of(self, number: int) -> str:
        """Return what messages call a shard."""
        return self.store.name(self.shards[number])


def open_dataset(location: Path | str, cache: Cache | None = None) -> Dataset:
    """Read the index of a dataset.

    Args:
        location: a directory, or a URL.
        cache: where copies of shards are kept, if such are needed; null means the default.

    Raises:
        DataError: no complete dataset there, or one that cannot be read.
    """
    where = without_secrets(str(location))
    files = read_descriptions(str(location), cache or Cache())
    shards = parse_index(files.index, f"{where}/{INDEX_NAME}")
    filled = next((i for i, shard in enumerate(shards) if shard.samples), None)
    if filled is None:
        raise DataError(f"{where}: a dataset without samples.")
    lengths = {shard.encoding.sample_length for shard in shards}
    if len(lengths) > 1:
        raise DataError(f"{where}: its shards have samples of different lengths: {lengths}.")
    dataset = Dataset(
        location=where,
        shards=shards,
        sample_length=lengths.pop() or 0,
        about=parse_about(files.about, f"{where}/{ABOUT_NAME}"),
        index_sha256=hashlib.sha256(files.index).hexdigest(),
        store=files.store,
    )
    if dataset.sample_length:
        return dataset
    return replace(dataset, sample_length=len(dataset.open_shard(filled).sample(0)))


def verify(dataset: Dataset, *, rank: int = 0, world_size: int = 1) -> list[str]:
    """Read every shard, and return a sentence on each that is missing, truncated or corrupt.

    Shards that need a copy are fetched or decompressed, and the copy is read.

    Args:
        rank, world_size: look at this rank's part of the shards only.
    """
    faults = []
    for number in range(rank, len(dataset.shards), world_size):
        try:
            dataset.open_shard(number)
            _check_hashes(dataset, number)
        except DataError as fault:
            faults.append(str(fault))
    return faults


def content_fault(dataset: Dataset) -> str | None:
    """Return in what the shards of the index are not the ones the dataset was made of, if any."""
    found = content_hash(dataset.shards)
    if dataset.about is None or found is None or found == dataset.about.content_sha256:
        return None
    return (
        f"{dataset.location}: {INDEX_NAME} lists other content (sha256 {found:.16}...) than "
        f"{ABOUT_NAME} is about ({dataset.about.content_sha256:.16}...); the two files belong to "
        "different datasets: fetch both again, or prepare the dataset again."
    )


def _check_hashes(dataset: Dataset, number: int) -> None:
    """Compare a file with those of its recorded digests that can be computed here."""
    shard = dataset.shards[number]
    if dataset.needs_copy(number):
        file, remedy = dataset.store.open_copy(shard), f"delete {dataset.store.path_of(shard)}"
    else:
        file = local_file(dataset.path, shard.basename).open("rb")
        remedy = "prepare the dataset again, or fetch this file again"
    with file:
        if fault := wrong_hash(file, shard):
            raise DataError(f"{dataset.name_of(number)}: corrupt shard: {fault}; {remedy}.")


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
    if fault := content_fault(dataset):
        raise DataError(fault)
    path, about = dataset.location, dataset.about
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
