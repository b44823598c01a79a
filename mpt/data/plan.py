"""What one call of `prepare` is to make, from where, and how it tells of its progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import mpt
from mpt.data.batches import Split
from mpt.data.curate.account import settings_of
from mpt.data.dataset import About
from mpt.data.source import Document, Meter, documents
from mpt.recipe import data as section
from mpt.recipe.model import Model
from mpt.storage import without_secrets
from mpt.tokenizer import Tokenizer

Stage = Literal["waiting", "tokenizer", "held-out", "again", "resuming", "dataset"]


@dataclass(frozen=True)
class Progress:
    """How far `prepare` has come."""

    stage: Stage
    """Waiting for another process that prepares here; reading for the tokenizer; reading what is
    held out; about to start over, for the source or a setting has changed since a call that was
    killed; reading past what that call finished; tokenizing and writing."""
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    read_bytes: int = 0
    """Of the source's files as they lie on the disk, compressed or not."""
    source_bytes: int | None = None
    """All of them; null where that is not known."""


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """One source, and where what is made of it goes."""

    source: section.Prepare
    eval_fraction: float
    model: Model
    tokenizer: Path
    paths: dict[Split, Path]
    watch: Watch
    workers: int
    """Processes that tokenize."""
    skipped: Counter[str] = field(default_factory=Counter)
    meter: Meter = field(default_factory=Meter)

    def documents(self) -> Iterator[Document]:
        """Yield the documents, and count what is skipped and read anew."""
        self.skipped.clear()
        self.meter.reset()

        def skip(_name: str, why: str) -> None:
            self.skipped[why] += 1

        return documents(self.source.source, self.source.text_key, skip, self.meter)

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
            curation=settings_of(self.source.curate) if self.source.curate else None,
        )
