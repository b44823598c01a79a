"""The weights of a model on disk, whole, one tensor at a time: no GPU, no process group."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpt.checkpoint.layout import read_manifest
from mpt.errors import CheckpointError

SHARDING_KEY = "DCP_SHARDING_INFO"
"""Where torch's DCP notes, in a file's metadata, at which offset of the whole a piece begins."""

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What weights may be stored as, by the name that safetensors has for it."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: where it is read from, and where in the whole tensor it belongs."""

    file: Path
    key: str
    """Its name in the file."""
    dtype: str
    """As safetensors calls it."""
    shape: Shape
    offset: Shape


@dataclass(frozen=True)
class Weights:
    """The weights of one model, by the names they have here."""

    directory: Path
    shapes: dict[str, Shape]
    """Of the whole tensors, whatever world size wrote them."""
    pieces: dict[str, tuple[Piece, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """Return what a tensor is stored as."""
        return DTYPES[self.pieces[name][0].dtype]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a tensor as stored, on the CPU; it takes memory for this one only.

        Args:
            rows: return only those from the first number up to the second.
        """
        start, stop = rows or (0, self.shapes[name][0])
        whole = torch.empty((stop - start, *self.shapes[name][1:]), dtype=self.dtype(name))
        for piece in self.pieces[name]:
            first = piece.offset[0]
            begin, end = max(start, first), min(stop, first + piece.shape[0])
            if begin < end:
                with safe_open(str(piece.file), framework="pt") as file:
                    part = file.get_slice(piece.key)[begin - first : end - first]
                whole[begin - start : end - start] = part
        return whole


def open_weights(directory: Path) -> Weights:
    """Index the weights of a committed checkpoint.

    Raises:
        CheckpointError: if a file cannot be read, or the pieces of a tensor do not fill it.
    """
    names = read_manifest(directory).names("weights")
    pieces = [piece for name in names for piece in pieces_in(directory / name)]
    return gather(directory, ((piece.key, piece) for piece in pieces))


def gather(directory: Path, placed: Iterable[tuple[str, Piece]]) -> Weights:
    """Return the weights that pieces make up, each given with the name of its tensor here.

    Raises:
        CheckpointError: if the pieces of a tensor do not fill it, or are not of one type.
    """
    pieces: dict[str, list[Piece]] = {}
    for name, piece in placed:
        pieces.setdefault(name, []).append(piece)
    shapes = {name: _whole_shape(name, found) for name, found in pieces.items()}
    return Weights(directory, shapes, {name: tuple(found) for name, found in pieces.items()})


def pieces_in(path: Path) -> list[Piece]:
    """Return what a safetensors file holds, which may come from a stranger.

    Raises:
        CheckpointError: if it cannot be read, or holds something other than floats.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            offsets: dict[str, Any] = json.loads((file.metadata() or {}).get(SHARDING_KEY, "{}"))
            found = []
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                view = file.get_slice(key)
                shape = tuple(view.get_shape())
                offset = offsets.get(key, {}).get("saved_offsets", [0] * len(shape))
                found.append(
                    Piece(path, key, view.get_dtype(), shape, tuple(int(start) for start in offset))
                )
    except (
        OSError,
        SafetensorError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return found


def _whole_shape(name: str, pieces: list[Piece]) -> Shape:
    """Return the shape that the pieces fill; they are blocks of rows, in any order."""
    first = pieces[0]
    for piece in pieces:
        if piece.dtype not in DTYPES or piece.dtype != first.dtype:
            raise CheckpointError(
                f"{piece.file}: {piece.key} is stored as {piece.dtype}, and all of {name} must be "
                f"of one of {', '.join(DTYPES)}."
            )
    rows_wanted = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        begins = (rows_wanted,) + (0,) * (len(piece.shape) - 1)
        if piece.offset != begins or piece.shape[1:] != first.shape[1:]:
            raise CheckpointError(
                f"{piece.file}: {name} has a piece of shape {piece.shape} at {piece.offset}, "
                f"but {begins} is where the next one must begin."
            )
        rows_wanted += piece.shape[0]
    return (rows_wanted, *first.shape[1:])
