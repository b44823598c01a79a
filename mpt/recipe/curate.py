"""The `prepare.curate:` section: which documents are kept, and what is masked in them.

Every rule is off unless it is named here. `near_duplicates: {}`, `gopher: {}` and the like turn a
group on with the values of its paper; `null` turns a single rule of a group off again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from mpt.recipe.problem import Problem

Treatment = Literal["off", "mask", "drop"]
"""Of what is personal: left, replaced by a placeholder, or the document dropped."""

MOST_WORDS = 64
"""Of a shingle or an n-gram."""
LEAST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Documents whose sets of word shingles are nearly the same; of such, the first is kept."""

    threshold: float = 0.8
    """Jaccard similarity of two documents' shingles from which the later one is dropped. It is
    estimated from 128 hashes: +- 0.035 at 0.8."""
    shingle_words: int = 5
    """Neighbouring words that make a shingle."""

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if not 0.5 <= self.threshold <= 1.0:
            yield Problem(
                "prepare.curate.near_duplicates.threshold",
                f"{self.threshold} is not in [0.5, 1].",
                "use 0.8.",
            )
        yield from _words("near_duplicates.shingle_words", self.shingle_words)


@dataclass(frozen=True, kw_only=True)
class Length:
    """Bounds, both inclusive, on the text as it is kept; words are what white space parts."""

    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None


@dataclass(frozen=True, kw_only=True)
class Gopher:
    """Quality and repetition rules of Rae et al. 2021, arXiv:2112.11446, A1.1 and table A1.

    Words are what white space parts, so in a script without spaces all of these but the rules on
    lines and paragraphs mean little.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    """Characters."""
    max_mean_word_length: float | None = 10.0
    max_symbols_per_word: float | None = 0.1
    """Hash signs, or ellipses, whichever there are more of."""
    max_bullet_lines: float | None = 0.9
    """Share of the lines that begin with a bullet."""
    max_ellipsis_lines: float | None = 0.3
    """Share of the lines that end with an ellipsis."""
    min_alphabetic_words: float | None = 0.8
    """Share of the words with a letter, of any script."""
    min_stop_words: int | None = None
    """How many of the, be, to, of, and, that, have, with. The paper's is 2; null, since it keeps
    English alone."""
    max_duplicate_lines: float | None = 0.30
    """Share of the lines that occurred before in the document; of its paragraphs; and the
    characters of either."""
    max_duplicate_paragraphs: float | None = 0.30
    max_duplicate_line_characters: float | None = 0.20
    max_duplicate_paragraph_characters: float | None = 0.20
    max_top_2_gram: float | None = 0.20
    """Share of the characters within the most frequent sequence of 2 words; of 3; of 4."""
    max_top_3_gram: float | None = 0.18
    max_top_4_gram: float | None = 0.16
    max_duplicate_5_gram: float | None = 0.15
    """Share of the characters within sequences of 5 words that occurred before; of 6; up to 10."""
    max_duplicate_6_gram: float | None = 0.14
    max_duplicate_7_gram: float | None = 0.13
    max_duplicate_8_gram: float | None = 0.12
    max_duplicate_9_gram: float | None = 0.11
    max_duplicate_10_gram: float | None = 0.10


@dataclass(frozen=True, kw_only=True)
class C4:
    """Rules of Raffel et al. 2020, JMLR 21(140), section 2.2, for English pages of the web."""

    punctuated_lines: bool = True
    """Remove lines that do not end with a full stop, `!`, `?` or a closing quotation mark."""
    min_words_per_line: int | None = 5
    """Remove shorter lines."""
    javascript_lines: bool = True
    """Remove lines that speak of Javascript."""
    policy_lines: bool = True
    """Remove lines on cookies, privacy and terms of use."""
    citations: bool = True
    """Remove marks such as [1] and [citation needed]."""
    lorem_ipsum: bool = True
    """Drop documents with that placeholder."""
    curly_bracket: bool = True
    """Drop documents with a `{`: most are code."""
    min_sentences: int | None = 3
    """Drop documents of which fewer are left."""


@dataclass(frozen=True, kw_only=True)
class Pii:
    """What identifies a person or opens a door."""

    email: Treatment = "off"
    """E-mail addresses; the mask is [EMAIL]."""
    ip: Treatment = "off"
    """Public IPv4 and IPv6 addresses; [IP]. Private, loopback and documentation ones stay."""
    secrets: Treatment = "off"
    """Private key blocks, and keys in the well-known forms of AWS, GitHub, Slack, JWT and others;
    [SECRET]."""


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Documents of `train` that share a sequence of words with what a model is tested on."""

    against: tuple[str, ...] = ()
    """Files, directories, globs or URLs of test texts; read as `prepare.source` is."""
    text_key: str = "text"
    """The key that holds the text in their JSON lines."""
    eval_split: bool = False
    """Also against this recipe's own `data.eval`; reads the source once more."""
    ngram_words: int = 13
    """Words of the sequence, case and punctuation ignored; 13 as in Brown et al. 2020,
    arXiv:2005.14165, appendix C. A test text with fewer is looked for as a whole document."""

    def problems(self, eval_fraction: float) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        key = "prepare.curate.decontaminate"
        if not self.against and not self.eval_split:
            yield Problem(key, "names nothing.", "set `eval_split: true`, or list `against:`.")
        if "" in self.against:
            yield Problem(f"{key}.against", "holds an empty path.")
        if self.eval_split and eval_fraction == 0:
            yield Problem(f"{key}.eval_split", "is true, but prepare.eval_fraction is 0.")
        yield from _words("decontaminate.ngram_words", self.ngram_words)


@dataclass(frozen=True, kw_only=True)
class Curate:
    exact_duplicates: bool = False
    """Keep the first of documents that are the same, byte for byte, after masking."""
    near_duplicates: NearDuplicates | None = None
    length: Length = field(default_factory=Length)
    gopher: Gopher | None = None
    c4: C4 | None = None
    pii: Pii = field(default_factory=Pii)
    decontaminate: Decontaminate | None = None
    limit_bytes: int = 1 << 32
    """Memory that the tables of duplicates and of test texts may take, each: 12 to 24 bytes a
    document for exact duplicates, 272 to 408 for near ones, 16 a word of test text."""

    def problems(self, eval_fraction: float) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        if self.near_duplicates is not None:
            yield from self.near_duplicates.problems()
        if self.decontaminate is not None:
            yield from self.decontaminate.problems(eval_fraction)
        for name, group in (("length", self.length), ("gopher", self.gopher), ("c4", self.c4)):
            for key, bound in asdict(group).items() if group else ():
                if bound is not None and not 0 <= bound < float("inf"):
                    yield Problem(f"prepare.curate.{name}.{key}", f"{bound} is no bound.")
        for name, group in (("length", self.length), ("gopher", self.gopher)):
            yield from _crossed(name, group) if group else ()
        if self.limit_bytes < LEAST_BYTES:
            yield Problem(
                "prepare.curate.limit_bytes",
                f"{self.limit_bytes} is less than {LEAST_BYTES}.",
                "use 4294967296.",
            )


EVERYTHING = Curate(
    exact_duplicates=True,
    near_duplicates=NearDuplicates(),
    gopher=Gopher(),
    c4=C4(
        punctuated_lines=False,
        min_words_per_line=None,
        javascript_lines=False,
        policy_lines=False,
        citations=False,
    ),
    pii=Pii(email="drop", ip="drop", secrets="drop"),
)
"""What is measured of a source for which no rule is chosen; nothing that changes a text."""


def _words(key: str, count: int) -> Iterator[Problem]:
    if not 1 <= count <= MOST_WORDS:
        yield Problem(f"prepare.curate.{key}", f"{count} is not in [1, {MOST_WORDS}].")


def _crossed(name: str, group: Length | Gopher) -> Iterator[Problem]:
    for entry in fields(group):
        least, most = (getattr(group, entry.name), entry.name.replace("min_", "max_", 1))
        bound = getattr(group, most, None)
        if most != entry.name and least is not None and bound is not None and least > bound:
            yield Problem(
                f"prepare.curate.{name}.{entry.name}", f"{least} is above {most} {bound}."
            )
