"""Recorded digests of files: which of them can be checked here, and what differs."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

from mpt.data.shard import ShardInfo, ZippedFile
from mpt.storage import hash_stream


def checkable_hashes(file: ShardInfo | ZippedFile) -> list[str]:
    """Return the recorded hash algorithms that every Python has; others cannot be checked."""
    return [
        name
        for name in file.hashes
        if name in hashlib.algorithms_guaranteed and not name.startswith("shake")
    ]


def wrong_hash(file: BinaryIO, wanted: ShardInfo | ZippedFile) -> str | None:
    """Return in what an open file differs from its recorded digests; None if in nothing."""
    for name in checkable_hashes(wanted):
        file.seek(0)
        seen = hash_stream(file, name)
        if seen != wanted.hashes[name]:
            return f"its {name} is {seen:.16}..., the index says {wanted.hashes[name][:16]!r}..."
    return None
