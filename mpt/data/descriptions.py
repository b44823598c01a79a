"""The two files that say what a dataset is, read from a directory or a URL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpt.data.fetch import Patience, fetch_small
from mpt.data.index import INDEX_NAME, LIMIT_INDEX_BYTES, has_index
from mpt.data.remote import RefusedError, file_url
from mpt.data.store import Store
from mpt.errors import DataError
from mpt.recipe.data import Cache
from mpt.storage import is_url, read_bounded, without_secrets

ABOUT_NAME = "dataset.json"
LIMIT_ABOUT_BYTES = 1 << 20


@dataclass(frozen=True)
class Descriptions:
    """What was read, and where the shards are to be had."""

    index: bytes
    about: bytes | None
    """Null where others made the dataset."""
    store: Store


def read_descriptions(location: str, cache: Cache) -> Descriptions:
    """Read what a dataset says of itself; remote files are fetched anew, and no copy is kept.

    Raises:
        DataError: no complete dataset there, or one that cannot be read.
    """
    return (_read_remote if is_url(location) else _read_local)(location, cache)


def _read_local(location: str, cache: Cache) -> Descriptions:
    directory = Path(location)
    if not has_index(directory):
        raise DataError(f"{directory}: not a dataset: it has no {INDEX_NAME}.")
    about = directory / ABOUT_NAME
    return Descriptions(
        index=read_bounded(directory / INDEX_NAME, limit_bytes=LIMIT_INDEX_BYTES),
        about=read_bounded(about, limit_bytes=LIMIT_ABOUT_BYTES) if about.exists() else None,
        store=Store(location, cache),
    )


def _read_remote(location: str, cache: Cache) -> Descriptions:
    patience = Patience(cache.timeout_s, cache.deadline_s)
    url = file_url(location, INDEX_NAME)
    try:
        index, version = fetch_small(url, LIMIT_INDEX_BYTES, patience)
    except RefusedError as error:
        raise DataError(f"{without_secrets(url)}: cannot be fetched: {error}.") from error
    try:
        about, _ = fetch_small(file_url(location, ABOUT_NAME), LIMIT_ABOUT_BYTES, patience)
    except RefusedError:  # S3 says that what is not there is forbidden, to who may not list
        return Descriptions(index, None, Store(location, cache, version))
    return Descriptions(index, about, Store(location, cache, version))
