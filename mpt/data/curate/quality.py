"""What Gopher's rules look at, measured of many texts at once.

Source: Rae et al. 2021, arXiv:2112.11446, A1.1. Words are what white space parts. Characters are
those of words, white space not counted, in numerator and denominator alike, so that every share is
in [0, 1]; a sequence of words is a duplicate where it, word for word, began earlier in the text.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mpt.data.curate.terms import hash_of, mix

Column = NDArray[np.float64]

TOP_GRAMS = (2, 3, 4)
DUPLICATE_GRAMS = (5, 6, 7, 8, 9, 10)
MEASURED_CHARACTERS = 1 << 20
"""Of a longer text only so many are measured: the memory of a worker is bounded by it."""
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("-", "*", "\u2022", "\u2023", "\u25e6", "\u25aa", "\u25cf", "\u2043", "\u00b7", "\u2013")
ELLIPSES = ("...", "\u2026")
REMEMBERED = 1 << 19
"""Words; when there are more, all are forgotten: some 100 MB."""
REMEMBERED_CHARACTERS = 1 << 25
_WORD = re.compile(r"\S+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def measure(texts: Sequence[str], words: Words) -> dict[str, Column]:
    """Return every measure of every text, by the name of its rule without its min_ or max_."""
    heads = [text[:MEASURED_CHARACTERS] for text in texts]
    seen = words.read([text.split() for text in heads])
    n = seen.counts.astype(float)
    some = np.maximum(n, 1)
    characters = np.maximum(seen.total(seen.lengths), 1).astype(float)
    symbols = [max(t.count("#"), t.count("...") + t.count("\u2026")) for t in heads]
    full = [count_words(text) if len(text) > MEASURED_CHARACTERS else 0 for text in texts]
    columns = {
        "words": np.maximum(n, full),
        "mean_word_length": seen.total(seen.lengths) / some,
        "symbols_per_word": np.array(symbols, float) / some,
        "alphabetic_words": seen.total(seen.alphabetic) / some,
        "stop_words": seen.distinct_stop_words().astype(float),
    }
    lines = np.array([_of_lines(text) for text in heads], float).reshape(-1, len(LINE_MEASURES))
    columns |= dict(zip(LINE_MEASURES, lines.T, strict=True))
    columns |= {name: share / characters for name, share in _of_grams(seen)}
    return columns


def count_words(text: str) -> int:
    """Return how many words a long text has, without holding them all."""
    return sum(1 for _ in _WORD.finditer(text))


LINE_MEASURES = (
    "bullet_lines",
    "ellipsis_lines",
    "duplicate_lines",
    "duplicate_line_characters",
    "duplicate_paragraphs",
    "duplicate_paragraph_characters",
)


def _of_lines(text: str) -> tuple[float, ...]:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    paragraphs = [part for part in map(str.strip, text.split("\n\n")) if part]
    many = max(len(lines), 1)
    return (
        sum(line.startswith(BULLETS) for line in lines) / many,
        sum(line.endswith(ELLIPSES) for line in lines) / many,
        *_duplicates(lines),
        *_duplicates(paragraphs),
    )


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """Return the share of parts that occurred before, and that of their characters."""
    unique = set(parts)
    if len(unique) == len(parts):
        return 0.0, 0.0
    characters = sum(map(len, parts))
    again = len(parts) - len(unique), characters - sum(map(len, unique))
    return again[0] / len(parts), again[1] / characters


@dataclass(frozen=True)
class Read:
    """The words of several texts, one after the other."""

    counts: NDArray[np.int64]  # (texts,)
    hashes: NDArray[np.uint64]  # (words,), as are the next three
    lengths: NDArray[np.int64]
    alphabetic: NDArray[np.int64]  # 1 where a letter is in it
    stop_word: NDArray[np.int64]  # a bit for each of STOP_WORDS

    def total(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sum of a value of words over each text."""
        sums = np.concatenate([[0], np.cumsum(values)])
        ends = np.cumsum(self.counts)
        result: NDArray[np.int64] = sums[ends] - sums[ends - self.counts]
        return result

    def distinct_stop_words(self) -> NDArray[np.int64]:
        found = [self.total((self.stop_word >> bit) & 1) > 0 for bit in range(len(STOP_WORDS))]
        result: NDArray[np.int64] = np.sum(found, axis=0)
        return result


class Words:
    """Splits texts into words, with a memory of those seen."""

    def __init__(self) -> None:
        self._memory = _Memory()

    def read(self, texts: Sequence[list[str]]) -> Read:
        """Return what counts of the words of texts."""
        memory = self._memory
        counts = np.array([len(words) for words in texts], np.int64)
        found = array("q", map(memory.__getitem__, chain.from_iterable(texts)))
        index = np.frombuffer(found, np.int64)
        packed = np.frombuffer(memory.packed, np.int64).reshape(-1, 3)
        lengths, flags = packed[index, 1], packed[index, 2]
        read = Read(counts, packed[index, 0].view(np.uint64), lengths, flags & 1, flags >> 1)
        del packed  # a view, and what has a view cannot grow
        if len(memory) > REMEMBERED or memory.characters > REMEMBERED_CHARACTERS:
            self._memory = _Memory()
        return read


class _Memory(dict[str, int]):
    """From a word to its number."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = array("q", (0, 0, 0))  # of each word: hash, length, flags
        self.characters = 0

    def __missing__(self, word: str) -> int:
        number = len(self.packed) // 3
        stop = word.lower()
        flags = 2 << STOP_WORDS.index(stop) if stop in STOP_WORDS else 0
        has_letter = word.isalpha() or any(map(str.isalpha, word))
        value = hash_of(word)
        self.packed.extend((value - (value >> 63 << 64), len(word), flags | has_letter))
        self.characters += len(word)
        self[word] = number
        return number


def _of_grams(read: Read) -> Iterator[tuple[str, Column]]:
    """Yield for each length the characters within the top sequence, or within duplicates.

    What occurs twice with n words does so with n - 1, so each length looks only where the one
    before it found something.
    """
    n_texts = len(read.counts)
    text_of = np.repeat(np.arange(n_texts), read.counts)
    ends = np.repeat(np.cumsum(read.counts), read.counts)
    hashes = mix(read.hashes + text_of.astype(np.uint64) * _MULTIPLIER)  # apart in each text
    words = read.hashes
    at = np.arange(len(words))
    for length in range(2, DUPLICATE_GRAMS[-1] + 1):
        inside = ends[at] >= at + length
        at, hashes = at[inside], hashes[inside]
        hashes = mix(hashes * _MULTIPLIER + words[at + length - 1])
        order = np.argsort(hashes, kind="stable")  # so each group is in the order of the text
        ordered = hashes[order]
        same = ordered[1:] == ordered[:-1]  # as the one before it
        later = np.concatenate([[False], same]) if len(ordered) else np.empty(0, bool)
        again = later | np.concatenate([same, [False]]) if len(ordered) else later
        if length in TOP_GRAMS:
            covered = _top(at[order], later, again, length, read, text_of)
            yield f"top_{length}_gram", covered
        elif length in DUPLICATE_GRAMS:
            covered = _covered(at[order[later]], length, read)
            yield f"duplicate_{length}_gram", covered
        repeated = np.sort(order[again])
        at, hashes = at[repeated], hashes[repeated]


def _top(
    at: NDArray[np.int64],
    later: NDArray[np.bool_],
    again: NDArray[np.bool_],
    length: int,
    read: Read,
    text_of: NDArray[np.int64],
) -> Column:
    """Return the characters within the most frequent sequence, the longest of such, of each text.

    `at` is where sequences begin, equal ones together.
    """
    at, group = at[again], np.cumsum(~later[again]) - 1
    if not len(at):
        return np.zeros(len(read.counts))
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    counts = np.diff(np.append(firsts, len(at)))
    sums = np.concatenate([[0], np.cumsum(read.lengths)])
    characters = (sums[at + length] - sums[at])[firsts]
    texts = text_of[at[firsts]]
    # The last of each text is the best; of equals the one that begins first.
    ranked = np.lexsort((-at[firsts], characters, counts, texts))
    best = ranked[np.flatnonzero(np.diff(texts[ranked], append=-1))]
    chosen = np.zeros(len(firsts), bool)
    chosen[best] = True
    return _covered(at[chosen[group]], length, read)


def _covered(begins: NDArray[np.int64], length: int, read: Read) -> Column:
    """Return the characters of words within sequences, none counted twice, of each text."""
    if not len(begins):
        return np.zeros(len(read.counts))
    edges = np.zeros(len(read.lengths) + 1, np.int64)
    np.add.at(edges, begins, 1)
    np.add.at(edges, begins + length, -1)
    inside = np.cumsum(edges[:-1]) > 0
    return read.total(np.where(inside, read.lengths, 0)).astype(float)
