"""What curation did to the documents of one side of the split: counts that add up, as JSON."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from mpt.data.curate.personal import mask_all

Counts = dict[str, list[int]]

EXAMPLES = 3
"""Kept of each rule."""
EXAMPLE_CHARACTERS = 200
SHOWN_OF = 1 << 14
"""Characters that an example is masked in before it is cut: a key at the cut is seen whole."""
HISTOGRAM = 32
"""Buckets: the i-th counts texts of 2**(i-1) to 2**i - 1 bytes."""
MOST_SOURCES = 512
"""Files or directories that are counted by name; those that come later are counted together."""
OTHERS = "(others)"
_LINE = re.compile(r":\d+\Z")


@dataclass
class Tally:
    """Counts of documents on one side of the split; each list is documents, bytes, ..."""

    came: list[int] = field(default_factory=lambda: [0, 0])
    """Documents, and bytes of them as they were."""
    kept: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Documents, bytes as edited, tokens."""
    dropped: Counts = field(default_factory=dict)
    """By the first rule that a document broke: documents, bytes as they were."""
    broken: Counts = field(default_factory=dict)
    """By every rule that it broke; duplicates are looked for among those that broke none."""
    edits: Counts = field(default_factory=dict)
    """Of documents that are kept, by what was changed: documents, changes."""
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """By rule: the name and the beginning of the first documents dropped, masked."""
    before: list[int] = field(default_factory=lambda: [0] * HISTOGRAM)
    after: list[int] = field(default_factory=lambda: [0] * HISTOGRAM)
    """Lengths of what came, and of what was kept."""
    sources: Counts = field(default_factory=dict)
    """By file, or by directory where a file is one document: documents, bytes; those kept, their
    bytes and tokens."""

    def plus(self, more: Tally) -> Tally:
        """Return the tally of these documents and of those after them."""
        sources = {name: list(counts) for name, counts in self.sources.items()}
        for name, counts in more.sources.items():
            known = name in sources or len(sources) < MOST_SOURCES
            into = sources.setdefault(name if known else OTHERS, [0] * len(counts))
            into[:] = _sum(into, counts)
        return Tally(
            came=_sum(self.came, more.came),
            kept=_sum(self.kept, more.kept),
            dropped=_merged(self.dropped, more.dropped),
            broken=_merged(self.broken, more.broken),
            edits=_merged(self.edits, more.edits),
            examples={
                rule: (self.examples.get(rule, []) + more.examples.get(rule, []))[:EXAMPLES]
                for rule in {**self.examples, **more.examples}
            },
            before=_sum(self.before, more.before),
            after=_sum(self.after, more.after),
            sources=sources,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def add_source(self, name: str, counts: list[int]) -> None:
        """Count a document by where it is from."""
        group = group_of(name)
        into = self.sources.setdefault(group, [0] * len(counts))
        into[:] = _sum(into, counts)

    def add_example(self, rule: str, name: str, text: bytes) -> None:
        """Keep the beginning of a document that a rule dropped, if few are kept yet."""
        held = self.examples.setdefault(rule, [])
        if len(held) < EXAMPLES:
            held.append({"name": name[-EXAMPLE_CHARACTERS:], "text": excerpt(text)})


def count(counts: Counts, key: str, *more: int) -> None:
    """Add to the counts under a key."""
    counts[key] = _sum(counts.get(key, [0] * len(more)), list(more))


def bucket(size: int) -> int:
    """Return which bucket of a histogram a length is in."""
    return min(size.bit_length(), HISTOGRAM - 1)


def excerpt(text: bytes) -> str:
    """Return the beginning of a text with what is personal in it masked."""
    head = text[: SHOWN_OF * 4].decode("utf-8", "ignore")[:SHOWN_OF]
    shown = mask_all(head)
    return shown[:EXAMPLE_CHARACTERS] + ("..." if len(shown) > EXAMPLE_CHARACTERS else "")


def group_of(name: str) -> str:
    """Return the file that a line is of, or the directory of a file that is a document."""
    file = _LINE.sub("", name)
    return file if file != name else str(PurePosixPath(name).parent)


def _sum(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _merged(one: Counts, other: Counts) -> Counts:
    both = {key: list(counts) for key, counts in one.items()}
    for key, counts in other.items():
        count(both, key, *counts)
    return both
