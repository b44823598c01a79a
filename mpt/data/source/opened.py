"""Files of a source: opened, listed and asked for, wherever they lie."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

from mpt.data.source.web import WebFile, is_there
from mpt.data.store import local_file
from mpt.errors import DataError
from mpt.storage import exists, is_url, list_files, open_binary, without_secrets


def open_file(location: str) -> BinaryIO:
    """Open a local path or a URL to be read as bytes.

    Raises:
        DataError: it cannot be opened; names the location and the cause.
    """
    if not is_web(location):
        return open_binary(location)
    try:
        return cast(BinaryIO, io.BufferedReader(WebFile(location), 1 << 20))
    except OSError as error:
        raise DataError(f"{without_secrets(location)}: cannot be opened: {error}") from error


def open_within(directory: str, name: str) -> BinaryIO:
    """Open a file that a directory's own list names; as open_file.

    Raises:
        DataError: also for a link that leads out of the directory.
    """
    if not is_url(directory):
        local_file(Path(directory), name)
    return open_file(f"{directory.rstrip('/')}/{name}")


def files_at(location: str) -> list[str]:
    """Return the files at a location, sorted; at a web server, which lists none, itself."""
    return [location] if is_web(location) else list_files(location)


def has_file(location: str) -> bool:
    """Say whether there is something at a location; DataError if one cannot tell."""
    if not is_web(location):
        return exists(location)
    try:
        return is_there(location)
    except OSError as error:
        raise DataError(f"{without_secrets(location)}: cannot be listed: {error}") from error


def is_web(location: str) -> bool:
    """Say whether a location is on a web server."""
    return urlsplit(location).scheme in ("http", "https")
