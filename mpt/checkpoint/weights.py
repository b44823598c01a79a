"""The weights of a checkpoint, whole, one tensor at a time: no GPU, no process group."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: where it is read from, and where in the whole tensor it belongs."""

    file: Path
    shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The weights of one checkpoint, by name."""

    directory: Path
    shapes: dict[str, tuple[int, ...]]
    """Of the whole tensors, whatever world size wrote them."""
    pieces: dict[str, tuple[Piece, ...]]

    def read(self, name: str) -> Tensor:
        """Return one whole tensor, as stored (fp32), on the CPU; memory for this one only."""
        parts = []
        for piece in self.pieces[name]:
            with safe_open(str(piece.file), framework="pt") as file:
                parts.append((piece, file.get_tensor(name)))
        whole = torch.empty(self.shapes[name], dtype=parts[0][1].dtype)
        for piece, part in parts:
            block = zip(piece.offset, piece.shape, strict=True)
            whole[tuple(slice(start, start + length) for start, length in block)] = part
        return whole


def open_weights(directory: Path) -> Weights:
    """Index the weights of a committed checkpoint.

    Raises:
        CheckpointError: if a file cannot be read, or the pieces of a tensor do not fill it.
    """
    pieces: dict[str, list[Piece]] = {}
    for name in read_manifest(directory).names("weights"):
        for tensor, piece in _pieces_in(directory / name):
            pieces.setdefault(tensor, []).append(piece)
    shapes = {name: _whole_shape(name, found) for name, found in pieces.items()}
    return Weights(directory, shapes, {name: tuple(found) for name, found in pieces.items()})


def _pieces_in(path: Path) -> list[tuple[str, Piece]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            offsets: dict[str, Any] = json.loads((file.metadata() or {}).get(SHARDING_KEY, "{}"))
            found = []
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                shape = tuple(file.get_slice(name).get_shape())
                offset = offsets.get(name, {}).get("saved_offsets", [0] * len(shape))
                found.append((name, Piece(path, shape, tuple(int(start) for start in offset))))
            return found
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _whole_shape(name: str, pieces: list[Piece]) -> tuple[int, ...]:
    """Return the shape that the pieces fill; they are blocks of rows, in any order."""
    rows_wanted = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        begins = (rows_wanted,) + (0,) * (len(piece.shape) - 1)
        if piece.offset != begins or piece.shape[1:] != pieces[0].shape[1:]:
            raise CheckpointError(
                f"{piece.file}: {name} has a piece of shape {piece.shape} at {piece.offset}, "
                f"but {begins} is where the next one must begin."
            )
        rows_wanted += piece.shape[0]
    return (rows_wanted, *pieces[0].shape[1:])
