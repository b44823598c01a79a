"""What a source is before it is read: enough to tell that it has changed since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from mpt.data.source import files_of, is_read
from mpt.errors import DataError
from mpt.storage import is_url, without_secrets


@dataclass(frozen=True)
class Fingerprint:
    """Of all files of a source."""

    digest: str
    """Of their names, sizes and ages; of URLs what their file system tells them apart by."""
    source_bytes: int | None
    """Of the files that are read, as they lie there; null where one does not say."""


def fingerprint(source: str) -> Fingerprint:
    """Look at the files of a source without reading them.

    Raises:
        DataError: no such source, or a file that went away meanwhile.
    """
    digest = hashlib.sha256(b"mpt source 1")
    total: int | None = 0
    for file, size, version in _look(source):
        digest.update(f"{len(file)} {file} {size} {version}\n".encode("utf-8", "surrogateescape"))
        if is_read(file, source) and total is not None:
            total = None if size is None else total + size
    return Fingerprint(digest.hexdigest(), total)


def _look(source: str) -> Iterator[tuple[str, int | None, str]]:
    """Yield name, bytes and version of each file."""
    for file in files_of(source):
        try:
            if is_url(file):
                from fsspec.core import url_to_fs

                system, path = url_to_fs(file)
                yield without_secrets(file), system.size(path), system.ukey(path)
            else:
                status = os.stat(file)
                yield file, status.st_size, str(status.st_mtime_ns)
        except Exception as cause:  # each fsspec backend raises errors of its own
            raise DataError(f"{without_secrets(file)}: cannot be looked at: {cause}") from cause
