"""What a source is, told by its name and by what lies there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mpt.data.index import INDEX_NAME
from mpt.data.remote import file_url
from mpt.data.source.files import is_known
from mpt.data.source.opened import has_file, is_web
from mpt.errors import DataError
from mpt.recipe.data import PYTHON_STDLIB, Cache
from mpt.recipe.delta import DELTA_PREFIX, Delta
from mpt.storage import is_url, without_secrets

Kind = Literal["stdlib", "files", "saved", "mds", "delta"]

DELTA_LOG = "_delta_log"
SAVED = ("state.json", "dataset_info.json")
"""What `datasets` writes beside the data of one split."""
SAVED_SPLITS = "dataset_dict.json"


@dataclass(frozen=True)
class Source:
    """Where documents come from, once it is known of what kind that is."""

    kind: Kind
    """stdlib: the modules of this Python; files: text, JSON lines, parquet or arrow; saved: a
    dataset of Hugging Face's; mds: one of mosaicml-streaming's; delta: a Delta Lake table."""
    location: str
    """A path, a glob pattern or a URL, with its secrets."""
    text_key: str = "text"
    """The key in JSON lines, or the column, that holds the text."""
    selection: Delta = field(default_factory=Delta)
    """Which version and rows of a Delta table; nothing to others."""
    cache: Cache = field(default_factory=Cache)
    """Where copies of the shards of a remote MDS dataset are kept."""


def find_source(
    location: str,
    text_key: str = "text",
    selection: Delta | None = None,
    cache: Cache | None = None,
) -> Source:
    """Look what kind of source lies at a location.

    Raises:
        DataError: it cannot be looked at, holds several splits, or is not of the kind that the
            recipe takes it for.
    """
    kind = _kind(location)
    if selection is not None and kind != "delta":
        raise DataError(
            f"{without_secrets(location)}: `prepare.delta` is for Delta Lake tables, and this is "
            "none; drop it, or name the directory of a table."
        )
    where = location.removeprefix(DELTA_PREFIX)
    return Source(kind, where, text_key, selection or Delta(), cache or Cache())


def _kind(location: str) -> Kind:
    if location == PYTHON_STDLIB:
        return "stdlib"
    if location.startswith(DELTA_PREFIX):
        return "delta"
    if is_url(location):
        return _kind_of_url(location)
    folder = Path(location)
    if (folder / DELTA_LOG).is_dir():
        return "delta"
    if (folder / INDEX_NAME).is_file() and any(folder.glob("*.mds*")):
        return "mds"
    if (folder / SAVED_SPLITS).is_file():
        raise _several_splits(location)
    return "saved" if all((folder / name).is_file() for name in SAVED) else "files"


def _kind_of_url(location: str) -> Kind:
    if is_known(location) or "*" in location:
        return "files"

    def has(name: str) -> bool:
        return has_file(file_url(location, name))

    if not is_web(location) and has(DELTA_LOG):  # a web server knows no directories
        return "delta"
    if has(INDEX_NAME):
        return "mds"
    if has(SAVED_SPLITS):
        raise _several_splits(location)
    return "saved" if all(map(has, SAVED)) else "files"


def _several_splits(location: str) -> DataError:
    where = without_secrets(location).rstrip("/")
    return DataError(
        f"{where}: a dataset of several splits; name the folder of one, such as {where}/train."
    )
