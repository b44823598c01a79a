"""Files of text, JSON lines, parquet or arrow: one, a directory of them, or those of a pattern."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO

import zstandard

from mpt.data.source import lines, parquet, saved, text
from mpt.data.source.compressed import decompress, inner_suffix
from mpt.data.source.document import Document, Meter, Skip
from mpt.data.source.look import Looked, look_at
from mpt.data.source.opened import files_at, open_file
from mpt.errors import DataError
from mpt.storage import without_secrets

TEXT_SUFFIX = re.compile(
    r"\.(txt|text|md|rst|tex|html?|xml|ya?ml|toml|proto|pyi?|c|h|cc|cpp|hpp|cu|go|rs"
    r"|java|kt|scala|jsx?|tsx?|css|rb|php|pl|lua|r|jl|hs|swift|cs|sh|sql|lean)"
)
"""Files of a directory that are read as text, one document each; others are passed over."""
ROWS = (".jsonl", ".parquet", ".arrow")
"""Files of many documents."""


def look(location: str) -> Iterator[Looked]:
    """Yield what the files of a source are, also those that are passed over."""
    for file in files_at(location):
        yield look_at(file, _is_read(file, location))


def read(location: str, text_key: str, on_skip: Skip, meter: Meter) -> Iterator[Document]:
    """Yield the documents of all files, in the order of their names."""
    for file in files_at(location):
        name, suffix = without_secrets(file), inner_suffix(file)
        if not _is_read(file, location):
            on_skip(name, "not a text file")
        elif suffix == ".arrow":
            yield from saved.read_file(file, text_key, on_skip, meter)
        else:
            with closing(open_file(file)) as raw:
                if suffix == ".parquet":
                    yield from parquet.read_file(raw, name, text_key, on_skip, meter)
                else:
                    yield from _read_text(raw, file, text_key, meter, is_alone=file == location)


def is_known(file: str) -> bool:
    """Say whether the name of a file or URL says that it holds text."""
    suffix = inner_suffix(file)
    return suffix in ROWS or bool(TEXT_SUFFIX.fullmatch(suffix))


def _is_read(file: str, location: str) -> bool:
    return file == location or is_known(file)


def _read_text(
    raw: BinaryIO, file: str, text_key: str, meter: Meter, *, is_alone: bool
) -> Iterator[Document]:
    name = without_secrets(file)
    try:
        with closing(decompress(raw, file)) as stream, meter.reading(raw.tell):
            if inner_suffix(file) == ".jsonl":
                yield from lines.json_lines(stream, name, text_key)
            else:
                yield from (text.pieces if is_alone else text.whole)(stream, name)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
