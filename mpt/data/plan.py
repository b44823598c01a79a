"""What one call of `prepare` is to make, from where, and how it tells of its progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import mpt
from mpt.data.about import About
from mpt.data.batches import Split
from mpt.data.curate.account import settings_of
from mpt.data.source import Document, Meter, Source, documents
from mpt.recipe import data as section
from mpt.recipe.delta import DELTA_PREFIX, Delta
from mpt.recipe.model import Model
from mpt.storage import without_secrets
from mpt.tokenizer import Tokenizer

Stage = Literal["waiting", "version", "tokenizer", "held-out", "again", "resuming", "dataset"]


@dataclass(frozen=True)
class Progress:
    """How far `prepare` has come."""

    stage: Stage
    """Waiting for another process that prepares here; keeping to the version of a table that a call
    that was killed has read, though there is a newer one; reading for the tokenizer; reading what
    is held out; about to start over, for the source or a setting has changed since a call that was
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
    """As the recipe has it."""
    cache: section.Cache
    eval_fraction: float
    model: Model
    tokenizer: Path
    paths: dict[Split, Path]
    watch: Watch
    workers: int
    """Processes that tokenize."""
    skipped: Counter[str] = field(default_factory=Counter)
    meter: Meter = field(default_factory=Meter)
    reads: Source | None = None
    """What is there, at the version that is read; null until something is to be made of it."""

    def documents(self) -> Iterator[Document]:
        """Yield the documents, and count what is skipped and read anew."""
        self.skipped.clear()
        self.meter.reset()

        def skip(_name: str, why: str) -> None:
            self.skipped[why] += 1

        return documents(self.found, skip, self.meter)

    @property
    def found(self) -> Source:
        """What is read."""
        assert self.reads is not None, "read before it was looked for"
        return self.reads

    @property
    def name(self) -> str:
        """What records and messages call the source: without secrets, or a word on its kind."""
        return without_secrets(self.source.source.removeprefix(DELTA_PREFIX))

    def about(self, split: Split, tokenizer: Tokenizer) -> About:
        """Return what a dataset made by this plan says of itself, before any text is in it."""
        chosen = self.source.delta or Delta()
        return About(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            source=self.name,
            selection=None if chosen == Delta() else asdict(chosen),
            text_key=self.source.text_key,
            split=split,
            eval_fraction=self.eval_fraction,
            created_by=f"mpt {mpt.__version__}",
            curation=settings_of(self.source.curate) if self.source.curate else None,
        )
