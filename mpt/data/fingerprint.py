"""What a source is before it is read: enough to tell that it has changed since."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from mpt.data.source import Source
from mpt.data.source.documents import look


@dataclass(frozen=True)
class Fingerprint:
    """Of all that the documents of a source are a function of."""

    digest: str
    """Of the names, sizes and ages of its files; of URLs, of what their file system tells them
    apart by; of a table, of its version's files too."""
    source_bytes: int | None
    """Of the files that are read, as they lie there; null where one does not say."""
    version: str
    """What people call it by: the number of a Delta table's version; else the digest."""


def fingerprint(source: Source) -> Fingerprint:
    """Look at a source without reading it.

    Raises:
        DataError: no such source, or a file that went away meanwhile.
    """
    digest = hashlib.sha256(b"mpt source 2")
    total: int | None = 0
    for seen in look(source):
        line = f"{len(seen.name)} {seen.name} {seen.size} {seen.version}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        if seen.is_read and total is not None:
            total = None if seen.size is None else total + seen.size
    version = source.selection.version
    return Fingerprint(
        digest.hexdigest(), total, digest.hexdigest() if version is None else str(version)
    )
