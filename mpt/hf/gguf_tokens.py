"""A tokenizer as the vocabulary that llama.cpp reads from a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpt.errors import UsageError
from mpt.sentencepiece_file import Kind
from mpt.tokenizer import SentencePieceTokenizer, load_tokenizer
from mpt.tokenizer_json import JsonTokenizer, json_to_export

TokenType = Literal["normal", "unknown", "control", "unused", "byte"]

_TYPES: dict[Kind, TokenType] = {
    "normal": "normal",
    "unknown": "unknown",
    "control": "control",
    "byte": "byte",
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What stands below `tokenizer.ggml.` in the file, one entry for each row of the embedding."""

    model: Literal["llama", "gpt2"]
    """llama: merges by score, bytes below; gpt2: merges by rank, over bytes."""
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    pre: str
    """How text is cut before it is merged, by llama.cpp's name for it."""
    eod_id: int
    unknown_id: int | None = None
    notes: tuple[str, ...] = ()
    """Texts that llama.cpp would read otherwise, a sentence each."""


def vocabulary(tokenizer_file: Path, n_rows: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, filled up with unused tokens to `n_rows`.

    Raises:
        DataError: if it is no tokenizer that mpt can use.
        UsageError: if llama.cpp has no such tokenizer; says what is in the way.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_pieces(tokenizer, n_rows)
    assert isinstance(tokenizer, JsonTokenizer)
    return _of_json(tokenizer, json.loads(json_to_export(tokenizer_file)), tokenizer_file, n_rows)


def _of_pieces(tokenizer: SentencePieceTokenizer, n_rows: int) -> Vocabulary:
    pieces = tokenizer.pieces
    unused = list(_unused({piece.text for piece in pieces}, n_rows - len(pieces)))
    tokens = tuple([piece.text for piece in pieces] + unused)
    types = _filled([_TYPES[piece.kind] for piece in pieces], n_rows)
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=types,
        scores=tuple([piece.score for piece in pieces] + [0.0] * len(unused)),
        pre="default",
        eod_id=tokenizer.eod_id,
        unknown_id=next(i for i, piece in enumerate(pieces) if piece.kind == "unknown"),
        notes=tuple(_other_readings(tokens, types)),
    )


def _of_json(
    tokenizer: JsonTokenizer, content: dict[str, Any], path: Path, n_rows: int
) -> Vocabulary:
    pre = _llama_cpp_pre(content, path)
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    by_id = {token: text for text, token in content["model"]["vocab"].items()} | special
    texts = [by_id[token] for token in range(tokenizer.vocab_size)]
    unused = list(_unused(set(texts), n_rows - len(texts)))
    kinds: list[TokenType] = ["control" if i in special else "normal" for i in range(len(texts))]
    pairs = (p if isinstance(p, list) else p.split(" ", 1) for p in content["model"]["merges"])
    return Vocabulary(
        model="gpt2",
        tokens=(*texts, *unused),
        types=_filled(kinds, n_rows),
        merges=tuple(f"{left} {right}" for left, right in pairs),
        pre=pre,
        eod_id=tokenizer.eod_id,
    )


def _llama_cpp_pre(content: dict[str, Any], path: Path) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer cuts text."""
    cutter = content["pre_tokenizer"] or {}
    whole_words = content["model"].get("ignore_merges", False)
    if cutter.get("type") == "ByteLevel" and cutter.get("use_regex", True) and not whole_words:
        return "gpt-2"
    raise UsageError(
        f"{path}: llama.cpp's vocabulary is not written for this tokenizer: it is for "
        "sentencepiece models, and for byte-level ones that cut text as GPT-2 does."
    )


def _filled(types: list[TokenType], n_rows: int) -> tuple[TokenType, ...]:
    more: list[TokenType] = ["unused"] * (n_rows - len(types))
    return tuple(types + more)


def _unused(taken: set[str], count: int) -> Iterator[str]:
    """Yield texts for rows of the embedding that no token has."""
    number = 0
    while count > 0:
        text = f"[PAD{number}]"
        if text not in taken:
            yield text
            count -= 1
        number += 1


def _other_readings(tokens: tuple[str, ...], types: tuple[TokenType, ...]) -> Iterator[str]:
    """Say which texts llama.cpp makes other tokens of than sentencepiece.

    It takes U+2581 for the space that it stands for in a piece, and merges whatever makes a
    token, be it a special one or that of a byte.
    """
    yield "llama.cpp reads the character U+2581 in a text as a space."
    known = set(tokens)
    for text, kind in zip(tokens, types, strict=True):
        if kind == "normal":
            continue
        for cut in range(1, len(text)):
            parts = text[:cut], text[cut:]
            if all(part in known or len(part) == 1 for part in parts):
                yield f"llama.cpp reads the text {text!r} as the {kind} token of that name."
                break
