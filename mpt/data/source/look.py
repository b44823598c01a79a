"""What a file of a source is before it is read: enough to tell that it has changed since."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mpt.data.source.opened import is_web
from mpt.data.source.web import WebFile
from mpt.errors import DataError
from mpt.storage import file_system, is_url, without_secrets


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
        if is_web(file):
            with WebFile(file) as opened:
                return Looked(name, opened.size, str(opened.version), is_read)
        system, path = file_system(file)
        size = system.size(path)
        return Looked(name, size, str(system.ukey(path)), is_read)
    except Exception as cause:  # each fsspec backend raises errors of its own
        what = type(cause).__name__ if name != file else str(cause)
        raise DataError(f"{name}: cannot be looked at: {what}") from cause
