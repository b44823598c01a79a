"""How a dataset came to be: the content of its dataset.json."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any

from mpt.errors import DataError
from mpt.storage import parse_json


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
    source_version: str = ""
    """The number of a Delta table's version; else what told the source's files apart by names,
    sizes and ages."""
    selection: dict[str, Any] | None = None
    """What the recipe says of a Delta table; null reads all of the newest version."""
    curation: dict[str, Any] | None = None
    """The rules of `prepare.curate` and what they did; null where there are none."""
    content_sha256: str = ""
    """Of the samples in their order: see `content_hash`."""

    def beforehand(self) -> About:
        """Return what was known of the dataset before its source was looked at."""
        empty = replace(self, documents=0, tokens=0, dropped_tokens=0, text_bytes=0)
        return replace(empty, source_version="", content_sha256="", curation=self.rules)

    @property
    def rules(self) -> dict[str, Any] | None:
        """The rules of `prepare.curate` without what they did; null where there are none."""
        if self.curation is None:
            return None
        return {key: self.curation.get(key) for key in ("version", "settings")}

    @property
    def tokens_per_byte(self) -> float:
        """Times nats per token, over ln 2, are bits per byte."""
        return self.tokens / self.text_bytes


def parse_about(payload: bytes | None, where: str) -> About | None:
    """Return what the bytes of a dataset.json say, every value's type checked; None for none.

    Raises:
        DataError: damaged, or of another version; names the key.
    """
    if payload is None:
        return None
    about = parse_json(payload, where)
    if not isinstance(about, dict):
        raise DataError(f"{where}: not an object.")
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (float, int),
        "dict[str, Any] | None": (dict, NoneType),
    }
    for entry in fields(About):
        if entry.name not in about:
            raise DataError(f"{where}: {entry.name}: is missing; prepare the dataset again.")
        if type(about[entry.name]) not in kinds[str(entry.type)]:
            raise DataError(f"{where}: {entry.name}: {about[entry.name]!r:.80} cannot be.")
    return About(**{entry.name: about[entry.name] for entry in fields(About)})
