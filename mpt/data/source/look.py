"""What a file of a source is before it is read: enough to tell that it has changed since."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mpt.errors import DataError
from mpt.storage import file_system, is_url, without_secrets

VERSION_KEYS = ("ETag", "Last-Modified")
"""What a web server tells a file's versions apart by, which fsspec's own key leaves out."""


@dataclass(frozen=True)
class Looked:
    """One file, or one other thing that the documents are a function of."""

    name: str
    size: int | None
    """Bytes as they lie there; null where that is not said."""
    version: str
    """Another one when the content is another."""
    is_read: bool = True
    """Whether it counts as bytes to be read."""


def look_at(file: str, is_read: bool = True) -> Looked:
    """Look at a file without reading it.

    Raises:
        DataError: it went away meanwhile.
    """
    name = without_secrets(file)
    try:
        if not is_url(file):
            status = os.stat(file)
            return Looked(name, status.st_size, str(status.st_mtime_ns), is_read)
        system, path = file_system(file)
        about = system.info(path)
        signs = [system.ukey(path), *(about[key] for key in VERSION_KEYS if about.get(key))]
        size = about.get("size")
        known = size if isinstance(size, int) else None
        return Looked(name, known, " ".join(map(str, signs)), is_read)
    except Exception as cause:  # each fsspec backend raises errors of its own
        what = type(cause).__name__ if name != file else str(cause)
        raise DataError(f"{name}: cannot be looked at: {what}") from cause
