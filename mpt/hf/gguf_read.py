"""Text to ids as llama.cpp reads it, from the vocabulary of a file alone: for the proof."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from mpt.tokenizer import SPACE_MARK

_TOKENS = "tokenizer.ggml.tokens"


def ids_of(values: Mapping[str, Any], text: str) -> list[int]:
    """Return the ids of `text` by a file's metadata.

    Source:
        llama.cpp, src/llama-vocab.cpp: its "SPM" tokenizer, and the byte-level "gpt2" one.
    """
    if values["tokenizer.ggml.model"] == "llama":
        return _by_scores(values[_TOKENS], values["tokenizer.ggml.scores"], text)
    return _by_merges(values[_TOKENS], values["tokenizer.ggml.merges"], text)


def _by_scores(tokens: list[str], scores: list[float], text: str) -> list[int]:
    """Of all neighbours that make a token together, merge the best, the leftmost of equals."""
    known = {token: (number, scores[number]) for number, token in enumerate(tokens)}
    parts = list(text.replace(" ", SPACE_MARK))
    while True:
        pairs = [
            (-known[left + right][1], at)
            for at, (left, right) in enumerate(pairwise(parts))
            if left + right in known
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        if part in known:
            ids.append(known[part][0])
        else:
            ids += [known[f"<0x{byte:02X}>"][0] for byte in part.encode()]
    return ids


def _by_merges(tokens: list[str], merges: list[str], text: str) -> list[int]:
    from tokenizers import Tokenizer, models, pre_tokenizers  # who has such a file has these

    vocabulary = {token: number for number, token in enumerate(tokens)}
    cut = [merge.partition(" ") for merge in merges]
    pairs = [(left, right) for left, _, right in cut]
    reader = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids: list[int] = reader.encode(text, add_special_tokens=False).ids
    return ids
