"""Text to token ids and back without losing a character: what a tokenizer is, and mpt's own."""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from mpt import sentencepiece_file
from mpt.errors import DataError
from mpt.sentencepiece_file import Piece
from mpt.storage import atomic_write

MODEL_FILE = "tokenizer.model"
"""What a sentencepiece model is called in a checkpoint or an export."""
JSON_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
"""What Hugging Face's format is called there; the latter names the end of document."""

EOD_PIECE = "<|endoftext|>"
UNK_PIECE = "<unk>"
SPACE_MARK = "\u2581"
"""How sentencepiece writes a space inside a piece; a literal one in a text is sent as bytes."""

_TRAINER_DROPS = {ord(SPACE_MARK): " ", 0x2585: " "}  # it drops any sentence that holds U+2585
_CHUNK = 4096  # characters; what the trainer sees as one sentence
_SAMPLE = 64 * 2**20  # characters; the trainer holds the whole sample in memory
_N_BYTES = 256
_N_SPECIAL = 2  # end of document, unknown

_TRAINING: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    # Indentation and ":\n" are most of a program's layout: let runs of blanks, and words of
    # mixed scripts such as "self.x" or "):\n", be pieces. Each alone and together, in bytes per
    # token on held-out Python at 4,096 pieces: neither 2.26, blanks 3.27, both 3.66.
    "allow_whitespace_only_pieces": True,
    "split_by_unicode_script": False,
    "max_sentence_length": 4 * _CHUNK,  # bytes; a longer sentence would be dropped
    "num_threads": 1,  # it is written into the file, so it must not depend on the machine
    "minloglevel": 2,
    "eos_id": 0,
    "eos_piece": EOD_PIECE,
    "unk_id": 1,
    "unk_piece": UNK_PIECE,
    "bos_id": -1,
    "pad_id": -1,
}


class Tokenizer(Protocol):
    """A lossless map: `decode(encode(text)) == text` for every text without lone surrogates."""

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document. No text encodes to it, not even its own spelling."""

    @property
    def sha256(self) -> str:
        """Hex digest of what counts: two tokenizers with the same one give the same ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without an end-of-document id.

        Raises:
            DataError: if `text` holds a lone surrogate, which UTF-8 cannot spell.
        """

    def encode_batch(self, texts: Sequence[str], *, n_threads: int = -1) -> list[list[int]]:
        """Return `encode(text)` of each text, on all cores if `n_threads` is -1."""

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes one id stands for: possibly part of a character, none if special.

        Raises:
            DataError: if `token` is not an id of this tokenizer.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD, special ids nothing."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a sentencepiece model, or in a tokenizer.json if it ends in .json.

    Raises:
        DataError: if the file is missing, is not what its name says, or has an option that loses
            text or that an exported tokenizer could not reproduce; the message names them all.
        UsageError: if a tokenizer.json is given and the `tokenizers` library is not installed.
    """
    if path.suffix != ".json":
        return SentencePieceTokenizer(path)
    from mpt import tokenizer_json  # at the top it would be imported by what it imports

    return tokenizer_json.JsonTokenizer(path)


def tokenizer_file_in(directory: Path) -> Path | None:
    """Return the tokenizer that a checkpoint or an export holds, or None.

    An export of a sentencepiece model holds both formats; the original counts.
    """
    paths = (directory / name for name in (MODEL_FILE, JSON_FILE))
    return next((path for path in paths if path.is_file()), None)


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return what a copy of a tokenizer consists of: content by the name to give it."""
    if path.suffix != ".json":
        return {MODEL_FILE: _read(path)}
    beside = path.with_name(CONFIG_FILE)
    kept = {JSON_FILE: _read(path)}
    return kept | {CONFIG_FILE: _read(beside)} if beside.is_file() else kept


def train_tokenizer(texts: Iterable[str], path: Path, *, vocab_size: int) -> None:
    """Learn `vocab_size` pieces from `texts` and write them to `path`, whole or not at all.

    The file is a function of the texts and the size alone. Of more than 64 Mi characters, an
    even sample of 32 to 64 Mi is used: more changes the pieces hardly, and memory much.

    Raises:
        DataError: if `vocab_size` is too small for 256 bytes, the special tokens and the
            characters of the texts, or larger than the texts can fill: an error, not a smaller
            tokenizer, because the model's shape follows from it. Also if `path` ends in .json.
    """
    if path.suffix == ".json":
        raise DataError(f"{path}: what is trained here is no tokenizer.json; end it in .model.")
    least = _N_BYTES + _N_SPECIAL
    if vocab_size < least:
        raise DataError(
            f"{path}: a vocabulary of {vocab_size} is too small: {_N_BYTES} bytes and {_N_SPECIAL}"
            f" special tokens come first; use {least} plus room for pieces, such as 4096."
        )
    sample = _even_sample(chunk for text in texts for chunk in _chunks(text))
    if not sample:
        raise DataError(f"{path}: there is no text to learn a tokenizer from.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample), model_writer=model, vocab_size=vocab_size, **_TRAINING
        )
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: {_why_training_failed(str(error), vocab_size)}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, model.getvalue())


class SentencePieceTokenizer:
    """A `Tokenizer` over a sentencepiece file; `pieces` are there for the export."""

    def __init__(self, path: Path) -> None:
        model = _read(path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = _processor(path, model)
        self.eod_id: int = self._processor.eos_id()
        self.pieces = _lossless_pieces(path, model, self.eod_id)
        self.vocab_size = len(self.pieces)
        self._bytes = [_bytes_of(piece) for piece in self.pieces]
        marks = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        self._space_mark_ids: list[int] = [self._processor.piece_to_id(mark) for mark in marks]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, n_threads: int = -1) -> list[list[int]]:
        # sentencepiece turns a literal U+2581 into a space. Nothing merges with a byte piece, so
        # encoding around it and putting its bytes between is what byte fallback would have done.
        parts = [utf8_text(text).split(SPACE_MARK) for text in texts]
        flat = [part for split in parts for part in split]
        ids = iter(self._processor.encode(flat, num_threads=n_threads))
        encoded = []
        for split in parts:
            joined: list[int] = next(ids)
            for _ in split[1:]:
                joined += self._space_mark_ids
                joined += next(ids)
            encoded.append(joined)
        return encoded

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is not within the tokenizer's {self.vocab_size}.")
        return self._bytes[token]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: no tokenizer can be read here: {error.strerror}.") from error


def _processor(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    if not model:  # sentencepiece takes it for "none given"
        raise DataError(f"{path}: not a sentencepiece model: the file is empty.")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError) as error:  # the last: no UTF-8 in its own message
        raise DataError(f"{path}: not a sentencepiece model: {error}.") from error


def _lossless_pieces(path: Path, model: bytes, eod_id: int) -> tuple[Piece, ...]:
    try:
        content = sentencepiece_file.parse(model)
    except (ValueError, KeyError, struct.error) as error:
        raise DataError(f"{path}: not a sentencepiece model: {error}.") from error
    unfit = list(content.losses())
    if eod_id < 0:
        unfit.append(f"it has no end-of-document token (eos_id; mpt's own is {EOD_PIECE})")
    if unfit:
        raise DataError(
            f"{path}: cannot be used, because {'; '.join(unfit)}. Let mpt train one, or train "
            "it as byte-fallback BPE with identity normalization and whitespace left alone."
        )
    return content.pieces


def _bytes_of(piece: Piece) -> bytes:
    match piece.kind:
        case "normal":
            return piece.text.replace(SPACE_MARK, " ").encode()
        case "byte":
            return bytes([int(piece.text[3:5], 16)])  # <0x0A>
        case _:
            return b""


def utf8_text(text: str) -> str:
    """Return `text`, having made sure that UTF-8 can spell it.

    Raises:
        DataError: it holds a lone surrogate; says which, and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}: no UTF-8 text does. Read it with errors='replace', or drop it."
        ) from error
    return text


def _chunks(text: str) -> Iterator[str]:
    """Cut `text` at line ends, where possible, into what the trainer takes as sentences."""
    text = utf8_text(text).translate(_TRAINER_DROPS)
    start = 0
    while start < len(text):
        end = start + _CHUNK
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _even_sample(chunks: Iterable[str]) -> list[str]:
    """Return the chunks in order; once over _SAMPLE characters, every second of them at random."""
    draw = random.Random(0).random
    kept: list[tuple[float, str]] = []
    rate, size = 1.0, 0
    for chunk in chunks:
        if (key := draw()) < rate:
            kept.append((key, chunk))
            size += len(chunk)
        while size > _SAMPLE:
            rate /= 2
            kept = [pair for pair in kept if pair[0] < rate]
            size = sum(len(chunk) for _, chunk in kept)
    return [chunk for _, chunk in kept]


def _why_training_failed(message: str, vocab_size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"the texts fill no more than {found[1]} pieces, and {vocab_size} were asked for; "
            f"ask for {found[1]} or fewer, or give more text."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} is too small: the bytes, the special tokens and the "
            f"characters of these texts alone take {found[1]}; ask for {found[1]} or more."
        )
    return f"sentencepiece could not learn a tokenizer: {message}"
