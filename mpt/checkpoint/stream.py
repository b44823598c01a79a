"""Tensors into safetensors files of bounded size, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mpt.checkpoint.weights import DTYPES, Shape

SHARD_BYTES = 5_000_000_000
"""Bytes a weight file may have: what the hub recommends."""

_ALIGNMENT = 8
"""The header is padded to a multiple of it, as the format wants."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Form(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: Shape

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def share_out(forms: Mapping[str, Form], shard_bytes: int) -> list[tuple[str, ...]]:
    """Return which file gets which tensors: in order, each file as full as `shard_bytes` allows."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, form in forms.items():
        if groups[-1] and filled + form.n_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += form.n_bytes
    return [tuple(group) for group in groups]


def write_file(path: Path, forms: Mapping[str, Form], read: Callable[[str], Tensor]) -> None:
    """Write tensors to a new safetensors file, and wait until it is on the disk.

    Args:
        forms: of the tensors; `read(name)` must keep to them.
        read: returns a tensor by name; it is asked for the next one only when the last is written.
    """
    # Widest type first, so that every tensor begins at a multiple of its own width.
    names = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
    with path.open("xb") as file:
        file.write(_header({name: forms[name] for name in names}))
        for name in names:
            tensor = read(name)
            assert Form(tensor.dtype, tuple(tensor.shape)) == forms[name]
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _header(forms: Mapping[str, Form]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, form in forms.items():
        stop = start + form.n_bytes
        table[name] = {
            "dtype": _NAMES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
