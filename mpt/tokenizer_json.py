"""A tokenizer.json of Hugging Face's format as a tokenizer, if it loses no text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import DataError, UsageError
from mpt.storage import read_json
from mpt.tokenizer import CONFIG_FILE, EOD_PIECE, SPACE_MARK, utf8_text

_LIMIT_BYTES = 1 << 26  # that of Gemma 3, with 262,144 tokens, has half of this
_CONFIG_LIMIT_BYTES = 1 << 22
_EOD_NAMES = (EOD_PIECE, "</s>", "<|end_of_text|>")
_LIKE_A_BYTE = re.compile("<0x..>", re.DOTALL)

_PATTERNS = frozenset(
    {
        # GPT-4, Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""Regular expressions that text may be cut by. A stranger's could take for ever on some text."""

HARD_TEXTS = (
    "def main(argv):\n    return [x for x in argv if x]\n",
    "\t\tif a  ==  b:\r\n\n\n",
    "  leading and trailing  ",
    "\x00\x07\x1b[0m",
    "naïve café, caf\u0065\u0301, Straße, 東京, עברית, ﬁ, \U0001f469\u200d\U0001f4bb",
    "can't, I'LL; 1234567890 1,000.50 don't . , !",
    f"{SPACE_MARK}{SPACE_MARK} a{SPACE_MARK} \u00a0\u3000\ufeff\ufffd",
    f"{EOD_PIECE}<unk><s></s><0x0A><|end_of_text|>",
    "-" * 300 + "=" * 77,
)
"""Texts that a tokenizer which loses something would lose something of."""


class JsonTokenizer:
    """A `Tokenizer` over a tokenizer.json: BPE over bytes, or over characters with bytes below."""

    def __init__(self, path: Path) -> None:
        content = _read(path)
        tokens = _tokens(path, content)
        _refuse_losses(path, content, tokens)
        self._backend = _backend(path, content)
        if self._backend.get_vocab(with_added_tokens=True) != tokens.ids:
            raise DataError(f"{path}: its added tokens have other ids than it says.")
        self.vocab_size = len(tokens.ids)
        self.eod = _eod(path, tokens)
        self.eod_id = tokens.special[self.eod]
        self.sha256 = _digest(content, self.eod_id)
        self._bytes = _bytes_of_ids(content, tokens)
        self._prove_lossless(path)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, n_threads: int = -1) -> list[list[int]]:
        # The library takes its threads from the process: RAYON_NUM_THREADS, which prepare sets.
        del n_threads
        sound = [utf8_text(text) for text in texts]
        found = self._backend.encode_batch_fast(sound, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is not within the tokenizer's {self.vocab_size}.")
        return self._bytes[token]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def _prove_lossless(self, path: Path) -> None:
        """Make sure of what the options promise, in our decoder and in the file's own."""
        for text in HARD_TEXTS:
            ids = self.encode(text)
            theirs = self._backend.decode(ids, skip_special_tokens=False)
            if self.decode(ids) != text or theirs != text:
                raise DataError(f"{path}: cannot be used, because it loses text: {text!r}.")


def json_to_export(path: Path) -> str:
    """Return the tokenizer.json that gives our ids in any program: nothing is added or cut off."""
    return json.dumps(_read(path), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Tokens:
    ids: Mapping[str, int]
    """Of all tokens; special ones are written as they look, others maybe in a byte alphabet."""
    special: Mapping[str, int]
    """Those that no text becomes."""
    merged: frozenset[str]
    """Those that merging makes."""


def _read(path: Path) -> dict[str, Any]:
    """Return the content, without what would cut texts off, fill them up or put tokens around."""
    content = read_json(path, limit_bytes=_LIMIT_BYTES)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer.json: it has no model.")
    return content | {"truncation": None, "padding": None, "post_processor": None}


def _tokens(path: Path, content: dict[str, Any]) -> _Tokens:
    """Return the tokens, having made sure that their ids are 0, 1, 2, ... and each has one."""
    try:
        model = content["model"]
        added = content.get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added if token["special"]}
        ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        pairs = (p if isinstance(p, list) else p.split(" ", 1) for p in model["merges"])
        merged = frozenset(left + right for left, right in pairs)
        if any(type(key) is not str or type(value) is not int for key, value in ids.items()):
            raise ValueError("an id that is not a whole number")
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("ids that are not 0, 1, 2, ..., each of one token")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a tokenizer.json of a BPE: {error}.") from error
    return _Tokens(ids, special, merged)


def _refuse_losses(path: Path, content: dict[str, Any], tokens: _Tokens) -> None:
    try:
        unfit = list(_losses(content, tokens))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a tokenizer.json: {error}.") from error
    if unfit:
        raise DataError(f"{path}: cannot be used, because {'; '.join(unfit)}.")


def _losses(content: dict[str, Any], tokens: _Tokens) -> Iterator[str]:
    """Yield each reason why this is no BPE that keeps every text, or is not safe to run."""
    model, added = content["model"], content.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        yield f"its model is {_name(model)}, not BPE"
    if content.get("normalizer") is not None:
        yield f"its normalizer ({_name(content['normalizer'])}) changes characters"
    yield from (
        f"{key} is {model[key]!r}"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    )
    if plain := [token["content"] for token in added if not token["special"]]:
        yield f"it has added tokens that are cut out of ordinary text, such as {plain[0]!r}"
    if _byte_level(content):
        yield from _bad_cuts(content.get("pre_tokenizer"))
        alphabet = _byte_alphabet()
        if missing := [char for char in alphabet if char not in tokens.ids]:
            yield f"{len(missing)} of 256 bytes have no token"
        if any(not set(text) <= alphabet.keys() for text in tokens.ids.keys() - tokens.special):
            yield "it has tokens that are not spelled in bytes"
        protected = set(tokens.special)
    else:
        yield from _bad_fallback(content, tokens)
        bytes_below = {text for text in tokens.ids if _LIKE_A_BYTE.fullmatch(text)}
        protected = tokens.special.keys() | bytes_below
    reachable = tokens.merged | {text for text in tokens.ids if len(text) == 1}
    if model.get("ignore_merges"):
        reachable |= model["vocab"].keys()
    if caught := sorted(reachable & protected & model["vocab"].keys()):
        yield f"ordinary text becomes {caught[0]!r}, which is special"


def _bad_cuts(cutter: Any) -> Iterator[str]:
    """Yield why text might be lost, or never come out, where it is cut before it is merged."""
    parts = cutter["pretokenizers"] if _name(cutter) == "Sequence" else [cutter]
    if [_name(part) for part in parts].count("ByteLevel") != 1 or _name(parts[-1]) != "ByteLevel":
        yield "its pre-tokenizer does not end in ByteLevel"
        return
    for part in parts:
        match _name(part):
            case "ByteLevel":
                if part.get("add_prefix_space"):
                    yield "add_prefix_space puts a space before every text"
            case "Digits":
                pass
            case "Split":
                if part["behavior"] != "Isolated":
                    yield f"its pre-tokenizer splits text as {part['behavior']!r}, not 'Isolated'"
                if part["pattern"].get("Regex") not in _PATTERNS:
                    yield "its pre-tokenizer splits text by a pattern that is not known here"
            case other:
                yield f"its pre-tokenizer is {other}"


def _bad_fallback(content: dict[str, Any], tokens: _Tokens) -> Iterator[str]:
    if not content["model"].get("byte_fallback"):
        yield "it is neither byte-level nor with byte_fallback, and loses what it has not seen"
        return
    if content.get("pre_tokenizer") is not None:
        yield f"its pre-tokenizer ({_name(content['pre_tokenizer'])}) is not known here"
    decoder = content.get("decoder") or {}
    if [_name(part) for part in decoder.get("decoders", ())] != ["ByteFallback", "Fuse"]:
        yield "its decoder does more, or less, than to put the tokens of bytes together"
    if missing := sum(f"<0x{byte:02X}>" not in tokens.ids for byte in range(256)):
        yield f"{missing} of 256 bytes have no token"


def _name(part: Any) -> str:
    return str((part or {}).get("type", "none"))


def _byte_level(content: dict[str, Any]) -> bool:
    return _name(content.get("decoder")) == "ByteLevel"


def _backend(path: Path, content: dict[str, Any]) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            f"{path}: the `tokenizers` library reads it: pip install 'mpt-train[hf]'."
        ) from error
    try:  # what we have looked at is what it gets: of a key given twice, it could take the other
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"{path}: not a tokenizer.json: {error}.") from error
    backend.encode_special_tokens = True  # a text that spells one is text
    return backend


def _eod(path: Path, tokens: _Tokens) -> str:
    """Return the end of document: as the file beside says, or the one of a usual name."""
    beside = path.with_name(CONFIG_FILE)
    names = [name for name in _EOD_NAMES if name in tokens.special]
    if beside.is_file():
        config = read_json(beside, limit_bytes=_CONFIG_LIMIT_BYTES)
        said = config.get("eos_token") if isinstance(config, dict) else None
        if said is not None:
            names = [str(said.get("content") if isinstance(said, dict) else said)]
    if len(names) != 1 or names[0] not in tokens.special:
        raise DataError(
            f"{path}: which token ends a document is not clear: it has {names or 'none'}; name a "
            f"special token as eos_token in {beside.name} beside it. Special are: "
            f"{', '.join(map(repr, sorted(tokens.special)[:8])) or 'none'}."
        )
    return names[0]


def _digest(content: dict[str, Any], eod_id: int) -> str:
    counts = json.dumps([content, eod_id], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(counts.encode("utf-8", errors="surrogatepass")).hexdigest()


def _bytes_of_ids(content: dict[str, Any], tokens: _Tokens) -> list[bytes]:
    alphabet = _byte_alphabet() if _byte_level(content) else None
    spelled = [b""] * len(tokens.ids)
    for text, token in tokens.ids.items():
        if text in tokens.special:
            continue
        if alphabet is not None:
            spelled[token] = bytes(alphabet[char] for char in text)
        elif _LIKE_A_BYTE.fullmatch(text):
            spelled[token] = bytes([int(text[3:5], 16)])
        else:
            spelled[token] = text.encode()
    return spelled


def _byte_alphabet() -> dict[str, int]:
    """Return which byte a character stands for in a byte-level vocabulary.

    Source:
        GPT-2: a byte that is a visible character of Latin-1 is that character; the others are
        the characters from U+0100 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
