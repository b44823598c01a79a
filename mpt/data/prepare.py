"""From documents to datasets: tokenize, split, pack, and leave all of it or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import mpt
from mpt.data.dataset import About, Dataset, check_tokenizer, open_dataset
from mpt.data.index import has_index
from mpt.data.pack import DatasetWriter, Packer
from mpt.data.shard import Encoding
from mpt.data.source import Document, documents
from mpt.errors import DataError
from mpt.recipe import data as section
from mpt.recipe.model import Model
from mpt.recipe.recipe import Recipe
from mpt.storage import fsync_dir, is_url, locked, without_secrets
from mpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

Split = Literal["train", "eval"]

BATCH_CHARACTERS = 1 << 20
"""Text that is tokenized at a time."""
LOCK_NAME = ".mpt-prepare.lock"
UINT16_IDS = 1 << 16


@dataclass(frozen=True)
class Progress:
    """How far `prepare` has come."""

    stage: Literal["waiting", "tokenizer", "dataset"]
    """Waiting for another process that prepares here; reading; tokenizing and writing."""
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


WAITING = Progress("waiting")
Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Prepared:
    """What a recipe reads, complete and on disk."""

    tokenizer: Path
    streams: dict[str, Dataset]
    eval: Dataset | None
    made: tuple[Path, ...]
    """What this call wrote; empty if all was there."""
    skipped: dict[str, int]
    """What was passed over in the source, counted by reason."""


@dataclass(frozen=True)
class _Plan:
    """One source, and where what is made of it goes."""

    source: section.Prepare
    eval_fraction: float
    model: Model
    tokenizer: Path
    paths: dict[Split, Path]
    watch: Watch
    skipped: Counter[str] = field(default_factory=Counter)

    def documents(self) -> Iterator[tuple[Split, Document, int]]:
        """Yield each document with its part of the split and its UTF-8 bytes."""
        self.skipped.clear()

        def skip(_name: str, why: str) -> None:
            self.skipped[why] += 1

        for document in documents(self.source.source, self.source.text_key, skip):
            payload = document.text.encode("utf-8")
            # By content: a text that occurs twice is never on both sides.
            draw = int.from_bytes(hashlib.sha256(payload).digest()[:8], "big") / 2**64
            yield "eval" if draw < self.eval_fraction else "train", document, len(payload)

    def about(self, split: Split, tokenizer: Tokenizer) -> About:
        """Return what a dataset made by this plan says of itself, before any text is in it."""
        return About(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            source=without_secrets(self.source.source),
            text_key=self.source.text_key,
            split=split,
            eval_fraction=self.eval_fraction,
            created_by=f"mpt {mpt.__version__}",
        )


def is_prepared(recipe: Recipe) -> bool:
    """Say whether the tokenizer and every dataset of a recipe are there and complete."""
    return not _missing(recipe)


def prepare(recipe: Recipe, *, progress: Watch | None = None) -> Prepared:
    """Make what is missing of a recipe's tokenizer and datasets; what is there is kept.

    A dataset is written beside its place and renamed there when it is whole, so a killed call
    leaves nothing that looks complete and the next one starts over. Two calls at once wait
    for each other. The files are a function of the documents and the recipe alone.

    Raises:
        DataError: no or too few documents, a text that cannot be read, a tokenizer that does
            not fit the model, or a dataset in the way that was made otherwise.
    """
    made: tuple[Path, ...] = ()
    skipped: Counter[str] = Counter()
    if recipe.prepare is not None:
        try:
            plan = _plan(recipe, recipe.prepare, progress or (lambda _: None))
            made, skipped = _make(plan, recipe), plan.skipped
        except OSError as error:
            raise DataError(f"cannot prepare: {error}.") from error
    elif missing := _missing(recipe):
        raise DataError(
            f"{missing[0]}: not there, or not complete, and the recipe has no `prepare:` section "
            "that says how to make it."
        )
    cache = recipe.data.cache
    return Prepared(
        tokenizer=Path(recipe.tokenizer.path),
        streams={name: open_dataset(s.path, cache) for name, s in recipe.data.streams.items()},
        eval=open_dataset(recipe.data.eval.path, cache) if recipe.data.eval else None,
        made=made,
        skipped=dict(skipped),
    )


def _missing(recipe: Recipe) -> list[Path]:
    datasets = [stream.path for stream in recipe.data.streams.values()]
    datasets += [recipe.data.eval.path] if recipe.data.eval else []
    missing = [] if os.path.isfile(recipe.tokenizer.path) else [Path(recipe.tokenizer.path)]
    return missing + [
        Path(path) for path in datasets if not is_url(path) and not has_index(Path(path))
    ]


def _plan(recipe: Recipe, source: section.Prepare, watch: Watch) -> _Plan:
    (stream,) = recipe.data.streams.values()  # the recipe's own checks see to that
    held_out = recipe.data.eval
    for path in (recipe.tokenizer.path, stream.path, held_out.path if held_out else ""):
        if is_url(path) or "\0" in path:
            raise DataError(f"{without_secrets(path)!r}: prepare writes to local paths only.")
    paths: dict[Split, Path] = {"train": Path(stream.path)}
    if held_out:
        paths["eval"] = Path(held_out.path)
        train, held = (path.resolve() for path in paths.values())
        if train.is_relative_to(held) or held.is_relative_to(train):
            raise DataError(f"{held_out.path}: lies in the same place as {stream.path}.")
    return _Plan(
        source=source,
        eval_fraction=source.eval_fraction if held_out else 0.0,
        model=recipe.model,
        tokenizer=Path(recipe.tokenizer.path),
        paths=paths,
        watch=watch,
    )


def _make(plan: _Plan, recipe: Recipe) -> tuple[Path, ...]:
    """Make what is missing and return it; whatever is there must be what this plan makes."""
    with ExitStack() as stack:
        if not is_prepared(recipe):
            outputs = [plan.tokenizer, *plan.paths.values()]
            for folder in sorted({path.resolve().parent for path in outputs}):  # no deadlock
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / LOCK_NAME, lambda: plan.watch(WAITING)))
        made = _make_tokenizer(plan)
        tokenizer = load_tokenizer(plan.tokenizer)
        check_tokenizer(tokenizer, plan.model)
        faults = [fault for split in plan.paths for fault in _in_the_way(plan, split, tokenizer)]
        if faults:
            raise DataError("\n".join(faults))
        absent = [s for s, path in plan.paths.items() if not has_index(path)]
        if absent:
            _write_datasets(plan, absent, tokenizer)
        return *made, *(plan.paths[split] for split in absent)


def _make_tokenizer(plan: _Plan) -> tuple[Path, ...]:
    if plan.tokenizer.is_file():
        return ()
    if plan.source.tokenizer == "existing":
        raise DataError(
            f"{plan.tokenizer}: no such file; put a tokenizer there, or set prepare.tokenizer to "
            "`train`."
        )
    texts = _training_texts(plan)
    first = next(texts, None)
    if first is None:
        raise DataError(f"{plan.source.source}: no documents to train a tokenizer on.")
    train_tokenizer(chain([first], texts), plan.tokenizer, vocab_size=plan.model.vocab_size)
    return (plan.tokenizer,)


def _training_texts(plan: _Plan) -> Iterator[str]:
    seen = Progress("tokenizer")
    for split, document, size in plan.documents():
        seen = replace(seen, documents=seen.documents + 1, text_bytes=seen.text_bytes + size)
        plan.watch(seen)
        if split == "train":
            yield document.text


def _in_the_way(plan: _Plan, split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what is wrong with a path that is taken; nothing there is ever written over."""
    path = plan.paths[split]
    if not has_index(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            yield f"{path}: is in the way: not a dataset, and not empty; move it, or name another."
        return
    dataset = open_dataset(path)
    if dataset.about is None:
        yield f"{path}: mpt did not make this dataset; drop `prepare:` to use it as it is."
        return
    wanted = plan.about(split, tokenizer)
    pairs: dict[str, tuple[object, object]] = {
        "samples of": (dataset.sample_length, plan.model.max_seq_len)
    } | {
        key: (getattr(dataset.about, key), getattr(wanted, key))
        for key in ("tokenizer_sha256", "text_key", "split", "eval_fraction")
    }
    if os.path.abspath(dataset.about.source) != os.path.abspath(wanted.source):
        pairs["source"] = (dataset.about.source, wanted.source)
    differ = [f"{key} {seen} (now {now})" for key, (seen, now) in pairs.items() if seen != now]
    if differ:
        yield (
            f"{path}: a dataset is there that was made with {', '.join(differ)}. "
            f"Delete {path} to make it again, or name another path."
        )


def _write_datasets(plan: _Plan, splits: list[Split], tokenizer: Tokenizer) -> None:
    """Write the absent datasets in one pass over the documents, and put them in place."""
    encoding = Encoding(
        "uint16" if tokenizer.vocab_size <= UINT16_IDS else "uint32", plan.model.max_seq_len
    )
    with ExitStack() as stack:
        packers = {}
        for split in splits:
            partial = _partial(plan.paths[split])
            if partial.exists():
                shutil.rmtree(partial)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)  # after a failure
            writer = DatasetWriter(partial, encoding, plan.source.shard_bytes)
            packers[split] = Packer(writer, plan.about(split, tokenizer))
        for batch in _batches(plan):
            for split, packer in packers.items():
                mine = [(document.text, size) for part, document, size in batch if part == split]
                encoded = tokenizer.encode_batch([text for text, _ in mine])
                packer.add(encoded, sum(size for _, size in mine))
            plan.watch(_progress([packer.about for packer in packers.values()]))
        for packer in packers.values():
            packer.finish()
        for split in reversed(splits):
            path = plan.paths[split].resolve()
            _partial(path).rename(path)
            fsync_dir(path.parent)


def _progress(abouts: list[About]) -> Progress:
    return Progress(
        "dataset",
        documents=sum(about.documents for about in abouts),
        text_bytes=sum(about.text_bytes for about in abouts),
        tokens=sum(about.tokens for about in abouts),
    )


def _batches(plan: _Plan) -> Iterator[list[tuple[Split, Document, int]]]:
    batch, size = [], 0
    for entry in plan.documents():
        batch.append(entry)
        size += len(entry[1].text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _partial(path: Path) -> Path:
    """Return where a dataset is written: beside its place, on the same disk."""
    place = path.resolve()
    return place.with_name(f"{place.name}.partial")
