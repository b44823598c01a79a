"""A tokenizer as the `tokenizer.json` that `AutoTokenizer` loads without our code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpt.sentencepiece_file import Piece
from mpt.tokenizer import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    SPACE_MARK,
    SentencePieceTokenizer,
    load_tokenizer,
)
from mpt.tokenizer_json import JsonTokenizer, json_to_export


def write_tokenizer(tokenizer_file: Path, out_dir: Path, *, max_length: int | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and, of a sentencepiece model, a copy.

    Ids and decoded text are those of `load_tokenizer(tokenizer_file)`, also for a text that
    spells out a special token: `split_special_tokens` has transformers read it as plain text. Who
    loads tokenizer.json with the `tokenizers` library alone must set
    `encode_special_tokens = True` for the same.

    Args:
        max_length: tokens the model takes, for transformers' warning about longer texts.

    Raises:
        DataError: if `tokenizer_file` is no tokenizer that mpt can use.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    if isinstance(tokenizer, SentencePieceTokenizer):
        eod, unknown = tokenizer.pieces[tokenizer.eod_id].text, _only(tokenizer, "unknown")
        _write_json(out_dir / JSON_FILE, tokenizer_json(tokenizer))
        (out_dir / MODEL_FILE).write_bytes(tokenizer_file.read_bytes())
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        eod, unknown = tokenizer.eod, None
        (out_dir / JSON_FILE).write_text(json_to_export(tokenizer_file), encoding="utf-8")
    _write_json(out_dir / CONFIG_FILE, _tokenizer_config(eod, unknown, max_length))


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json, in the format of the `tokenizers` library.

    Pieces carry real spaces, where other conversions keep U+2581 and replace spaces by it: so
    a U+2581 in a text stays what it is, and neither normalizer nor pre-tokenizer is needed.
    """
    vocabulary = {_text(piece): i for i, piece in enumerate(tokenizer.pieces)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, piece in enumerate(tokenizer.pieces)
            if piece.kind in ("control", "unknown")
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _only(tokenizer, "unknown"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in _merges(tokenizer.pieces)],
        },
    }


def _merges(pieces: tuple[Piece, ...]) -> Iterator[tuple[str, str]]:
    """Yield the pairs to merge, first rule first.

    sentencepiece stores no merges: it merges any two neighbours that make a piece, the piece of
    the highest score first, the leftmost of equals first. So each way to cut a piece in two
    pieces is a rule, and rules rank by score.
    """
    normal = {_text(piece): piece.score for piece in pieces if piece.kind == "normal"}
    for text in sorted(normal, key=lambda text: -normal[text]):
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                yield text[:cut], text[cut:]


def _tokenizer_config(eod: str, unknown: str | None, max_length: int | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        # Without it AutoTokenizer takes GPTNeoX's class for model type mpt, whose pre-tokenizer
        # gives other ids.
        "tokenizer_class": "TokenizersBackend",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "eos_token": eod,
        "pad_token": eod,  # something must fill a batch; attention_mask hides it
    }
    if unknown is not None:
        config["unk_token"] = unknown
    return config if max_length is None else config | {"model_max_length": max_length}


def _only(tokenizer: SentencePieceTokenizer, kind: str) -> str:
    """Return the text of the one piece of a kind; sentencepiece makes sure of one unknown."""
    return next(piece.text for piece in tokenizer.pieces if piece.kind == kind)


def _text(piece: Piece) -> str:
    return piece.text.replace(SPACE_MARK, " ") if piece.kind == "normal" else piece.text


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
