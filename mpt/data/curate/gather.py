"""The texts that training must not see: test texts that a recipe names, and its own eval split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mpt.data.batches import Batch
from mpt.data.curate.heldout import HeldOut, hold
from mpt.data.curate.judge import Judge
from mpt.data.source import documents, find_source
from mpt.recipe.curate import Curate, Decontaminate
from mpt.recipe.data import Cache


def gather(
    settings: Curate, source: Iterable[Batch], eval_fraction: float, folder: Path, cache: Cache
) -> HeldOut | None:
    """Return the table of what is held out, or None if nothing is to be looked for.

    The eval split is read before anything is written, so it does not matter whether a document of
    `train` comes before or after the one of `eval` that it shares words with. Documents of `eval`
    that a rule drops are not held out; their duplicates are.

    Args:
        source: all documents, if they are asked for.
        folder: where the table may lie on the disk.
        cache: where copies of remote shards among the test texts are kept.

    Raises:
        DataError: test texts that cannot be read, or that take too much memory.
    """
    wanted = settings.decontaminate
    if wanted is None:
        return None
    return hold(
        _texts(settings, wanted, source, eval_fraction, cache),
        wanted.ngram_words,
        settings.limit_bytes,
        folder,
    )


def _texts(
    settings: Curate,
    wanted: Decontaminate,
    source: Iterable[Batch],
    eval_fraction: float,
    cache: Cache,
) -> Iterator[str]:
    for location in wanted.against:
        found = find_source(location, wanted.text_key, cache=cache)
        for document in documents(found, lambda _name, _why: None):
            yield document.text
    if wanted.eval_split:
        judge = Judge(settings, None, eval_fraction)
        for batch in source:
            yield from judge.kept(batch.texts, "eval")
