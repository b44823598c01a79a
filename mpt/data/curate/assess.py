"""What the rules of a recipe would do to a source, or to a sample of it; nothing is written."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpt.data.batches import SPLITS, Batch, batches
from mpt.data.curate.account import account, settings_of
from mpt.data.curate.gather import gather
from mpt.data.curate.judge import Judge
from mpt.data.curate.settle import Settler
from mpt.data.curate.tally import Tally
from mpt.data.encode import Encoder
from mpt.data.source import Document, Meter, Source, documents
from mpt.errors import DataError
from mpt.recipe.curate import EVERYTHING, Curate
from mpt.storage import without_secrets
from mpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Assessed:
    """What was found, in the form of a dataset's curation.json, and of how much."""

    account: dict[str, Any]
    chosen: bool
    """Whether the recipe names rules; else all were tried."""
    sample: float
    """Share of the documents that were looked at."""
    skipped: dict[str, int]
    """What was passed over in the source, counted by reason."""


def assess(
    source: Source,
    *,
    settings: Curate | None = None,
    eval_fraction: float = 0.0,
    tokenizer: Tokenizer | None = None,
    sample: float = 1.0,
    watch: Callable[[Batch], None] = lambda _: None,
) -> Assessed:
    """Judge a source by the rules of a recipe, or by all there are if it names none.

    A sample is drawn by a hash of each text: the same documents every time, and exact duplicates
    together; of near duplicates a sample finds its own share only.

    Raises:
        DataError: the source cannot be read, or holds nothing, or the sample none of it.
    """
    skipped: Counter[str] = Counter()

    def read() -> Iterator[Batch]:
        skipped.clear()
        meter = Meter()
        found = documents(source, lambda _name, why: skipped.update([why]), meter)
        return batches(filter(lambda document: is_in_sample(document, sample), found), meter)

    rules = settings or EVERYTHING
    encoder = Encoder(tokenizer, eval_fraction) if tokenizer else None
    ids = np.zeros(tokenizer.vocab_size, np.int64) if tokenizer else None
    table = gather(rules, read(), eval_fraction, Path(tempfile.gettempdir()), source.cache)
    judge, settler, tally = Judge(rules, encoder, eval_fraction, table), Settler(rules), Tally()
    try:
        for batch in read():
            judged = judge.encode(batch.texts, SPLITS)
            for added in settler.settle(batch, judged, list(SPLITS)).values():
                tally = tally.plus(added.tally or Tally())
                if ids is not None:
                    ids += np.bincount(added.tokens, minlength=len(ids))
            watch(batch)
    finally:
        if table is not None:
            table.close()
    if not tally.came[0]:
        what = f"no document in a sample of {sample:g}; take a larger one."
        if sample >= 1.0:
            what = "no documents; name a source of text, or a dataset, which has an index.json."
        raise DataError(f"{without_secrets(source.location)}: {what}")
    found = account(settings_of(rules), tally, ids)
    return Assessed(found, settings is not None, sample, dict(skipped))


def is_in_sample(document: Document, sample: float) -> bool:
    """Say whether a document is in a sample of this share: a function of its text alone."""
    if sample >= 1.0:
        return True
    digest = hashlib.sha256(document.text.encode("utf-8")).digest()
    # Not the bytes that draw its side of the split, nor those of its key.
    return int.from_bytes(digest[16:24], "big") / 2**64 < sample
