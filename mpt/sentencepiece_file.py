"""What a sentencepiece model file says about itself: its pieces, and options its API hides."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]

# Numbers and defaults of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER, _DENORM = 1, 2, 3, 5
_KINDS: dict[int, Kind] = {
    1: "normal",
    2: "unknown",
    3: "control",
    4: "user_defined",
    5: "unused",
    6: "byte",
}
_VARINT, _SIZED, _FOUR_BYTES = 0, 2, 5  # protobuf's wire types
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    text: str
    """As in the file, with U+2581 for a space; `<0x0A>` for the byte 10."""
    score: float
    """Of two possible merges, the one into the piece of higher score comes first."""
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class SentencePieceFile:
    pieces: tuple[Piece, ...]
    """In order of their ids."""
    model_type: str
    byte_fallback: bool
    normalizes: bool
    """Characters are replaced while encoding or decoding."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    def losses(self) -> Iterator[str]:
        """Yield each reason why this is no BPE that keeps every text and can be exported."""
        if self.model_type != "bpe":
            yield f"its model_type is {self.model_type}, not bpe"
        if not self.byte_fallback:
            yield "byte_fallback is off, which loses characters it has not seen"
        if self.normalizes:
            yield "its normalization changes characters"
        if self.add_dummy_prefix:
            yield "add_dummy_prefix puts a space before every text"
        if self.remove_extra_whitespaces:
            yield "remove_extra_whitespaces drops spaces"
        if not self.escape_whitespaces:
            yield "escape_whitespaces is off"
        if self._count("user_defined"):
            yield "it has user_defined_symbols, which are cut out of ordinary text"
        if self._count("unused"):
            yield "it has unused pieces"
        if any(" " in piece.text for piece in self.pieces if piece.kind == "normal"):
            yield "it has pieces with an unescaped space"

    def _count(self, kind: Kind) -> int:
        return sum(piece.kind == kind for piece in self.pieces)


def parse(model: bytes) -> SentencePieceFile:
    """Return the content of a model file that sentencepiece itself has already accepted.

    Read by hand, because the processor does not tell its options and protobuf is no dependency.

    Raises:
        ValueError: if `model` is no well-formed protobuf message.
    """
    sections: dict[int, list[bytes]] = {n: [] for n in (_PIECES, _TRAINER, _NORMALIZER, _DENORM)}
    for (number, wire_type), value in _fields(model):
        if number in sections and wire_type == _SIZED:
            sections[number].append(value)
    # A section given twice is merged, and of a field given twice the last counts.
    trainer, normalizer, denormalizer = (
        dict(_fields(b"".join(sections[n]))) for n in (_TRAINER, _NORMALIZER, _DENORM)
    )
    return SentencePieceFile(
        pieces=tuple(_piece(dict(_fields(message))) for message in sections[_PIECES]),
        model_type=_MODEL_TYPES.get(trainer.get((3, _VARINT), 1), "unknown"),
        byte_fallback=bool(trainer.get((35, _VARINT), False)),
        normalizes=any(spec.get((2, _SIZED)) for spec in (normalizer, denormalizer)),
        add_dummy_prefix=bool(normalizer.get((3, _VARINT), True)),
        remove_extra_whitespaces=bool(normalizer.get((4, _VARINT), True)),
        escape_whitespaces=bool(normalizer.get((5, _VARINT), True)),
    )


def _piece(fields: dict[tuple[int, int], Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get((2, _FOUR_BYTES), bytes(4)))
    text: bytes = fields.get((1, _SIZED), b"")
    return Piece(text.decode(), score, _KINDS[fields.get((3, _VARINT), 1)])


def _fields(message: bytes) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yield ((field number, wire type), value) of a protobuf message, not of those inside it.

    The wire type is part of the key because protobuf passes over a field of an unexpected one.
    Source: protobuf.dev/programming-guides/encoding.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:  # _VARINT
                value, at = _varint(message, at)
                yield (key >> 3, _VARINT), value
                continue
            case 1:
                size = 8
            case 2:  # _SIZED
                size, at = _varint(message, at)
            case 5:  # _FOUR_BYTES
                size = 4
            case wire_type:
                raise ValueError(f"wire type {wire_type} at byte {at}")
        yield (key >> 3, key & 7), message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number that starts at `at`, seven bits a byte, and where it ends."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:  # no more to come
            return value, at
    raise ValueError("the file ends within a number")
