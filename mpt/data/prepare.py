"""From documents to datasets: tokenize, split, pack, and leave all of it or nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from mpt.data.batches import Split, batches, split_of
from mpt.data.curate.judge import Judge
from mpt.data.dataset import Dataset, check_tokenizer, open_dataset
from mpt.data.index import has_index
from mpt.data.pin import pinned, unpin
from mpt.data.plan import Plan, Progress, Watch
from mpt.data.write import write_datasets
from mpt.errors import DataError
from mpt.recipe import data as section
from mpt.recipe.recipe import Recipe
from mpt.storage import is_url, locked, without_secrets
from mpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

LOCK_NAME = ".mpt-prepare.lock"
WAITING = Progress("waiting")


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


def is_prepared(recipe: Recipe) -> bool:
    """Say whether the tokenizer and every dataset of a recipe are there and complete."""
    return not _missing(recipe)


def prepare(
    recipe: Recipe, *, progress: Watch | None = None, workers: int | None = None
) -> Prepared:
    """Make what is missing of a recipe's tokenizer and datasets; what is there is kept.

    A dataset is written beside its place and renamed there when it is whole, so a killed call
    leaves nothing that looks complete, and the next one goes on from its finished shards. Two
    calls at once wait for each other. The files are a function of the documents and the recipe
    alone, of neither the workers nor the kills.

    Args:
        progress: called with how far it has come.
        workers: processes that tokenize; by default one for each core that this one may use.

    Raises:
        DataError: no or too few documents, a text that cannot be read, a tokenizer that does
            not fit the model, or a dataset in the way that was made otherwise.
    """
    made: tuple[Path, ...] = ()
    skipped: Counter[str] = Counter()
    if recipe.prepare is not None:
        try:
            n_workers = workers or len(os.sched_getaffinity(0))
            plan = _plan(recipe, recipe.prepare, progress or (lambda _: None), n_workers)
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


def _plan(recipe: Recipe, source: section.Prepare, watch: Watch, workers: int) -> Plan:
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
    return Plan(
        source=source,
        cache=recipe.data.cache,
        eval_fraction=source.eval_fraction if held_out else 0.0,
        model=recipe.model,
        tokenizer=Path(recipe.tokenizer.path),
        paths=paths,
        watch=watch,
        workers=workers,
    )


def _make(plan: Plan, recipe: Recipe) -> tuple[Path, ...]:
    """Make what is missing and return it; whatever is there must be what this plan makes."""
    with ExitStack() as stack:
        if is_prepared(recipe):
            unpin(plan)  # a kill may have come just before that
        else:
            outputs = [plan.tokenizer, *plan.paths.values()]
            for folder in sorted({path.resolve().parent for path in outputs}):  # no deadlock
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / LOCK_NAME, lambda: plan.watch(WAITING)))
            plan = stack.enter_context(pinned(plan))
        made = _make_tokenizer(plan)
        tokenizer = load_tokenizer(plan.tokenizer)
        check_tokenizer(tokenizer, plan.model)
        faults = [fault for split in plan.paths for fault in _in_the_way(plan, split, tokenizer)]
        if faults:
            raise DataError("\n".join(faults))
        absent = [s for s, path in plan.paths.items() if not has_index(path)]
        if absent:
            write_datasets(plan, absent, tokenizer)
        return *made, *(plan.paths[split] for split in absent)


def _make_tokenizer(plan: Plan) -> tuple[Path, ...]:
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


def _training_texts(plan: Plan) -> Iterator[str]:
    """Yield what a tokenizer may learn from: `train`, masked and without what a rule drops."""
    seen = Progress("tokenizer")
    curate = plan.source.curate
    judge = Judge(curate, None, plan.eval_fraction) if curate else None
    for batch in batches(plan.documents(), plan.meter):
        for text in batch.texts:
            seen = replace(
                seen, documents=seen.documents + 1, text_bytes=seen.text_bytes + len(text)
            )
            plan.watch(seen)
            if judge is None and split_of(text, plan.eval_fraction) == "train":
                yield text.decode("utf-8")
        if judge is not None:
            yield from judge.kept(batch.texts, "train")


def _in_the_way(plan: Plan, split: Split, tokenizer: Tokenizer) -> Iterator[str]:
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
        for key in ("tokenizer_sha256", "text_key", "split", "eval_fraction", "selection")
    }
    if os.path.abspath(dataset.about.source) != os.path.abspath(wanted.source):
        pairs["source"] = (dataset.about.source, wanted.source)
    if dataset.about.rules != wanted.rules:
        pairs["prepare.curate"] = ("other rules", "those of the recipe")
    differ = [f"{key} {seen} (now {now})" for key, (seen, now) in pairs.items() if seen != now]
    if differ:
        yield (
            f"{path}: a dataset is there that was made with {', '.join(differ)}. "
            f"Delete {path} to make it again, name another path, or drop `prepare:` to use it as "
            "it is."
        )
