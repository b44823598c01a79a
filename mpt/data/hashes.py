"""Recorded digests of files: which of them can be checked here, and what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import BinaryIO, Protocol

from mpt.data.shard import ShardInfo
from mpt.storage import hash_stream


class Hashed(Protocol):
    """What an index says of a file."""

    @property
    def hashes(self) -> dict[str, str]:
        """Hex digest of the file by algorithm."""


def checkable_hashes(file: Hashed) -> list[str]:
    """Return the recorded hash algorithms that every Python has; others cannot be checked."""
    return [
        name
        for name in file.hashes
        if name in hashlib.algorithms_guaranteed and not name.startswith("shake")
    ]


def content_hash(shards: Iterable[ShardInfo]) -> str | None:
    """Return what stands for the samples of a dataset, in hex; None where a shard has no sha256.

    SHA-256 of "mpt content 1", then for each shard, in order, its samples and the SHA-256 of its
    uncompressed file, a line each. So it is the same for the same shards, wherever they lie,
    whatever their files are called and whether they are compressed, and another one for other
    tokens, another order or another cut into shards.
    """
    digest = hashlib.sha256(b"mpt content 1\n")
    for shard in shards:
        if "sha256" not in shard.hashes:
            return None
        digest.update(f"{shard.samples} {shard.hashes['sha256']}\n".encode())
    return digest.hexdigest()


def wrong_hash(file: BinaryIO, wanted: Hashed) -> str | None:
    """Return in what an open file differs from its recorded digests; None if in nothing."""
    for name in checkable_hashes(wanted):
        file.seek(0)
        seen = hash_stream(file, name)
        if seen != wanted.hashes[name]:
            return f"its {name} is {seen:.16}..., the index says {wanted.hashes[name][:16]!r}..."
    return None
