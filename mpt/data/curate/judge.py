"""What one core finds of a batch of documents: the text that is kept, and the rules it breaks.

A document is edited (C4's lines, then masks), the edited text is measured, its side of the split is
drawn from it, and only then is it tokenized: no text that a model sees is on both sides. Whether it
is a duplicate is not known here; what is needed to tell is returned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.data.batches import SPLITS, Split, split_of
from mpt.data.curate import lines, personal, quality
from mpt.data.curate.heldout import HeldOut
from mpt.data.curate.rules import DECONTAMINATED, Column, broken, rules_of
from mpt.data.curate.sketch import N_HASHES, band_shape, sketch
from mpt.data.curate.terms import SLICE_CHARACTERS, Reader
from mpt.data.encode import Encoder
from mpt.recipe.curate import Curate
from mpt.recipe.plain import curate_from
from mpt.tokenizer import Tokenizer

EDITS = ("lines", "citations", *personal.KINDS)
"""What is changed in a text, and counted."""


@dataclass(frozen=True)
class Judged:
    """Of each document of a batch, in its order."""

    sides: NDArray[np.uint8]  # (n,): of SPLITS
    verdicts: NDArray[np.uint64]  # (n,): a bit for each rule that is broken
    sizes: NDArray[np.uint32]  # (n,): bytes of the text as edited
    edits: NDArray[np.uint32]  # (n, EDITS)
    keys: NDArray[np.uint64]  # (n,): of the text, to tell exact duplicates
    sketched: NDArray[np.bool_]  # (n,): whether it has a term
    bands: NDArray[np.uint64]  # (n, bands)
    sketches: NDArray[np.uint8]  # (n, N_HASHES), or (n, 0)
    n_tokens: NDArray[np.uint32]  # (n,): 0 where a text is not wanted, or breaks a rule
    tokens: NDArray[Any]


class Judge:
    """Judges and tokenizes on one core."""

    def __init__(
        self,
        settings: Curate,
        encoder: Encoder | None,
        eval_fraction: float,
        held_out: HeldOut | None = None,
    ) -> None:
        """Without an encoder nothing is tokenized."""
        self.encoder = encoder
        self.settings = settings
        self._eval_fraction = eval_fraction
        self._held_out = held_out
        self._rules = rules_of(settings)
        self._words, self._reader = quality.Words(), Reader()

    @classmethod
    def of_arguments(cls, encoder: Encoder, eval_fraction: float, told: Sequence[str]) -> Judge:
        """Return the judge that gave these arguments, in another process."""
        settings = curate_from(json.loads(told[0]))
        table = HeldOut(*map(int, told[1:])) if len(told) > 1 else None
        return cls(settings, encoder, eval_fraction, table)

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.encoder is not None
        return self.encoder.tokenizer

    def arguments(self) -> list[str]:
        """Return what a worker is told to make this judge, its tokenizer aside."""
        table = self._held_out
        settings = asdict(self.settings)
        if settings["decontaminate"]:
            settings["decontaminate"][
                "against"
            ] = []  # read already; may hold secrets, and `ps` shows
        told = [repr(self._eval_fraction), json.dumps(settings)]
        if table is not None:
            told += map(str, (table.descriptor, table.count, table.ngram_words))
        return told

    def descriptors(self) -> list[int]:
        """Return the open files that a worker must have too."""
        return [self._held_out.descriptor] if self._held_out is not None else []

    def pack(self, result: Judged) -> tuple[dict[str, Any], bytes]:
        """Return what a worker answers."""
        return {}, b"".join(array.tobytes() for array in vars(result).values())

    def unpack(self, _head: dict[Any, Any], payload: bytes, n: int) -> Judged:
        """Return what `pack` packed of n documents."""
        assert self.encoder is not None
        return unpack(payload, n, self.settings, self.encoder.dtype)

    def encode(self, texts: Sequence[bytes], wanted: Sequence[Split]) -> Judged:
        """Return what is found, with the tokens of documents on the sides that are wanted."""
        edited, edits, columns = self._edit([text.decode("utf-8") for text in texts])
        payloads = [text.encode("utf-8") for text in edited]
        sides = [SPLITS.index(split_of(payload, self._eval_fraction)) for payload in payloads]
        in_training = np.array([SPLITS[side] == "train" for side in sides], bool)
        columns |= self._measure(edited)
        sketches = self._sketch(edited, in_training, columns)
        verdicts = broken(self._rules, columns, len(texts))
        chosen = [
            number
            for number, (side, verdict) in enumerate(zip(sides, verdicts, strict=True))
            if not verdict and SPLITS[side] in wanted
        ]
        n_tokens = np.zeros(len(texts), np.uint32)
        tokens = np.empty(0, np.uint16)
        if self.encoder is not None:
            tokens = self.encoder.tokens([payloads[number] for number in chosen])
            ends = np.flatnonzero(tokens == self.encoder.tokenizer.eod_id)
            n_tokens[chosen] = np.diff(ends, prepend=-1)
        return Judged(
            np.array(sides, np.uint8),
            verdicts,
            np.array([len(payload) for payload in payloads], np.uint32),
            edits,
            np.array([_key(payload) for payload in payloads], np.uint64),
            *sketches,
            n_tokens,
            tokens,
        )

    def kept(self, texts: Sequence[bytes], split: Split) -> list[str]:
        """Return the edited texts of a side that break no rule, duplicates among them."""
        edited, _, columns = self._edit([text.decode("utf-8") for text in texts])
        sides = [split_of(text.encode("utf-8"), self._eval_fraction) for text in edited]
        mine = np.array([side == split for side in sides], bool)
        chosen = [text for text, side in zip(edited, sides, strict=True) if side == split]
        columns = {name: column[mine] for name, column in columns.items()} | self._measure(chosen)
        verdicts = broken(self._rules, columns, len(chosen))
        return [text for text, verdict in zip(chosen, verdicts, strict=True) if not verdict]

    def _edit(self, texts: list[str]) -> tuple[list[str], NDArray[np.uint32], dict[str, Column]]:
        """Return the texts as they are to be kept, what was changed, and what was found."""
        edits = np.zeros((len(texts), len(EDITS)), np.uint32)
        columns: dict[str, Column] = {}
        if rules := self.settings.c4:
            columns["lorem_ipsum"] = np.array(["lorem ipsum" in t.lower() for t in texts], float)
            columns["curly_bracket"] = np.array(["{" in text for text in texts], float)
            changed = [lines.remove_lines(text, rules) for text in texts]
            edits[:, 0] = [each.lines for each in changed]
            edits[:, 1] = [each.citations for each in changed]
            texts = [each.text for each in changed]
        for kind in personal.KINDS:
            treatment = getattr(self.settings.pii, kind)
            if treatment == "off":
                continue
            found = [personal.mask(text, kind) for text in texts]
            counts = np.array([count for _, count in found])
            columns[f"pii.{kind}"] = counts.astype(float)
            if treatment == "mask":
                edits[:, EDITS.index(kind)] = counts
                texts = [text for text, _ in found]
        return texts, edits, columns

    def _measure(self, texts: list[str]) -> dict[str, Column]:
        columns = {"characters": np.array([len(text) for text in texts], float)}
        if self.settings.gopher is not None:
            columns |= quality.measure(texts, self._words)
        elif {"min_words", "max_words"} & _set(self.settings):
            columns["words"] = np.array([quality.count_words(text) for text in texts], float)
        if self.settings.c4 is not None and self.settings.c4.min_sentences is not None:
            columns["sentences"] = np.array([lines.sentences(text) for text in texts], float)
        return columns

    def _sketch(
        self, texts: list[str], in_training: NDArray[np.bool_], columns: dict[str, Column]
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint64], NDArray[np.uint8]]:
        """Return what tells near duplicates, and note who shares words with what is held out."""
        near, n = self.settings.near_duplicates, len(texts)
        nothing = np.zeros(n, bool), np.zeros((n, 0), np.uint64), np.zeros((n, 0), np.uint8)
        if near is None and self._held_out is None:
            return nothing
        terms = self._reader.read([text[:SLICE_CHARACTERS] for text in texts])
        if self._held_out is not None:
            shared = self._held_out.shared_by(texts, terms, self._reader)
            columns[DECONTAMINATED] = (shared & in_training).astype(float)
        if near is None:
            return nothing
        found = sketch(terms, near.shingle_words, near.threshold)
        return found.found, found.bands, found.bytes


def unpack(payload: bytes, n: int, settings: Curate, dtype: np.dtype[np.unsignedinteger]) -> Judged:
    """Return the arrays of n documents from their bytes."""
    near = settings.near_duplicates
    n_bands, n_hashes = (band_shape(near.threshold)[0], N_HASHES) if near else (0, 0)
    shapes: list[tuple[Any, tuple[int, ...]]] = [
        (np.uint8, (n,)),
        (np.uint64, (n,)),
        (np.uint32, (n,)),
        (np.uint32, (n, len(EDITS))),
        (np.uint64, (n,)),
        (np.bool_, (n,)),
        (np.uint64, (n, n_bands)),
        (np.uint8, (n, n_hashes)),
        (np.uint32, (n,)),
    ]
    arrays: list[NDArray[Any]] = []
    at = 0
    for kind, shape in shapes:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(payload, kind, count, at).reshape(shape))
        at += arrays[-1].nbytes
    arrays.append(np.frombuffer(payload, dtype, offset=at))
    return Judged(*arrays)


def _key(payload: bytes) -> int:
    """Return 64 bits of the SHA-256 of a text, others than those that draw its side."""
    return int.from_bytes(hashlib.sha256(payload).digest()[8:16], "big")


def _set(settings: Curate) -> set[str]:
    return {key for key, bound in vars(settings.length).items() if bound is not None}
