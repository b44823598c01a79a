"""One copy of a rank's state in shared memory: laid out, filled, sealed, and known to be whole.

    offset 0            mark (8 bytes), length and CRC of the label (4 bytes each), label (JSON)
    HEADER_BYTES        the rank's local shard of each tensor, one after the other

The mark is wiped before the first byte of a copy changes and written after the last one, so a
process that is killed at any instruction leaves a copy that is whole or one without a mark.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpt.dist import local_tensor

HEADER_BYTES = 1 << 20
STATE_BYTES = HEADER_BYTES - 4096
"""Room for the state as JSON text."""

_MARK = b"mpt-copy"
_LABEL = struct.Struct("<8sII")  # mark, length, CRC-32
_ALIGNMENT = 64
"""Bytes of a cache line: each tensor begins on one."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Where each tensor's local shard lies within a copy."""

    pieces: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    """Name, dtype, shape and offset of each."""
    payload_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout for these tensors; the same tensors always give the same one."""
        pieces, offset = [], 0
        for name, tensor in sorted(tensors.items()):
            local = local_tensor(tensor)
            pieces.append((name, local.dtype, tuple(local.shape), offset))
            offset += _round_up(local.nbytes, _ALIGNMENT)
        return cls(tuple(pieces), _round_up(max(offset, 1), _CHUNK_BYTES))

    @property
    def slot_bytes(self) -> int:
        """Memory that one copy takes, its header included."""
        return HEADER_BYTES + self.payload_bytes


class Slot:
    """A place for one copy, within memory that is mapped."""

    def __init__(self, memory: mmap.mmap, start: int, layout: Layout, identity: str) -> None:
        """Look at a place; what it holds is left alone.

        Args:
            identity: of what may be kept here; a copy of anything else does not count.
        """
        self._memory = memory
        self._start = start
        self._identity = identity
        begin = start + HEADER_BYTES
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._payload = whole[begin : begin + layout.payload_bytes]
        self._views: dict[str, Tensor] = {}
        for name, dtype, shape, offset in layout.pieces:
            count = torch.Size(shape).numel() * dtype.itemsize
            self._views[name] = self._payload[offset : offset + count].view(dtype).view(shape)

    def clear(self) -> None:
        """Make what is here count for nothing."""
        self._memory[self._start : self._start + len(_MARK)] = bytes(len(_MARK))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy this rank's local shards in. The copy does not count before it is sealed.

        On a GPU the copies are queued; the caller waits for them.
        """
        self.clear()
        for name, view in self._views.items():
            view.copy_(local_tensor(tensors[name]), non_blocking=True)

    def seal(self, state: dict[str, Any]) -> None:
        """Say what the copy is, and that it is whole; `state` takes less than `STATE_BYTES`."""
        label = {"identity": self._identity, "checksum": self._checksum(), "state": state}
        text = json.dumps(label).encode()
        assert len(text) <= HEADER_BYTES - _LABEL.size, "it would run into the tensors"
        head = _LABEL.pack(bytes(len(_MARK)), len(text), zlib.crc32(text))
        self._memory[self._start : self._start + len(head) + len(text)] = head + text
        self._memory[self._start : self._start + len(_MARK)] = _MARK

    def read(self) -> dict[str, Any] | None:
        """Return the state of the copy here; None if there is none that is whole and ours."""
        begin = self._start + _LABEL.size
        mark, length, crc = _LABEL.unpack(self._memory[self._start : begin])
        if mark != _MARK or length > HEADER_BYTES - _LABEL.size:
            return None
        text = self._memory[begin : begin + length]
        if zlib.crc32(text) != crc:
            return None
        label = json.loads(text)
        if label["identity"] != self._identity or label["checksum"] != self._checksum():
            return None
        state: dict[str, Any] = label["state"]
        return state

    def pour(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors from the copy, in place."""
        for name, view in self._views.items():
            local_tensor(tensors[name]).copy_(view)

    def _checksum(self) -> str:
        """Return a hash of the sum of each chunk: at the speed of memory, and no flipped bit or
        misplaced chunk goes by. (CRC-32 took 7 times as long, BLAKE2 15 times.)"""
        words = self._payload.view(torch.int64).view(-1, _CHUNK_BYTES // 8)
        sums = words.sum(dim=1)  # (chunks,), modulo 2^64
        return hashlib.blake2b(sums.numpy().tobytes(), digest_size=16).hexdigest()


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
