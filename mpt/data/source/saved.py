"""Datasets that Hugging Face's `datasets` has saved: streams of Arrow record batches.

`save_to_disk` writes, for each split, data-*-of-*.arrow in the streaming format of Arrow IPC, and
state.json, which lists these files in their order. A selection or a shuffle is applied when it is
saved, so the rows are what lies there; `datasets` itself is not needed to read them.
Source: datasets.arrow_dataset.Dataset.save_to_disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from mpt.data.remote import file_url
from mpt.data.source.column import check_column, documents_of
from mpt.data.source.document import Document, Meter, Skip
from mpt.data.source.extras import needed
from mpt.data.source.look import Looked, look_at
from mpt.data.source.opened import open_file
from mpt.data.store import local_file
from mpt.errors import DataError
from mpt.storage import is_url, parse_json, without_secrets

LIMIT_STATE_BYTES = 1 << 24
END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a stream of record batches; without it, a truncated one could look whole."""


def look(location: str) -> Iterator[Looked]:
    """Yield what the files are, and what says which they are."""
    yield Looked("files", None, json.dumps([os.path.basename(f) for f in _files(location)]), False)
    for file in _files(location):
        yield look_at(file)


def read(location: str, text_key: str, on_skip: Skip, meter: Meter) -> Iterator[Document]:
    """Yield the documents of one split."""
    for file in _files(location):
        if not is_url(file):
            local_file(Path(location), os.path.basename(file))  # no link that leads out
        yield from read_file(file, text_key, on_skip, meter)


def read_file(file: str, text_key: str, on_skip: Skip, meter: Meter) -> Iterator[Document]:
    """Yield the documents in one column of a file of record batches."""
    name = without_secrets(file)
    with needed("parquet", name):
        import pyarrow as pa
    first = 0
    with closing(open_file(file)) as raw:
        _check_end(raw, name)
        # A map is not read before it is looked at; of a URL, a whole batch is held in memory.
        stream = pa.PythonFile(raw) if is_url(file) else pa.memory_map(file)
        with stream, meter.reading(stream.tell):
            for batch in _batches(stream, text_key, name):
                rows = range(first, first + batch.num_rows)
                yield from documents_of(batch.column(text_key), name, rows, on_skip)
                first = rows.stop


def _files(location: str) -> list[str]:
    """Return the files that state.json lists."""
    path = file_url(location, "state.json")
    name = without_secrets(path)
    with closing(open_file(path)) as file:
        payload = file.read(LIMIT_STATE_BYTES + 1)
    state = parse_json(payload, name)
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{name}: lists no data files; save the dataset again.") from error
    for entry in names:
        if not isinstance(entry, str) or os.path.basename(entry) != entry or not entry.strip("."):
            raise DataError(f"{name}: {entry!r:.80} is not the name of a file beside it.")
    return [file_url(location, entry) for entry in names]


def _check_end(raw: BinaryIO, name: str) -> None:
    size = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, size - len(END)))
    if raw.read() != END:
        raise DataError(
            f"{name}: not a whole stream of Arrow record batches, as `datasets` saves them; "
            "it is cut short, or of another format."
        )
    raw.seek(0)


def _batches(stream: Any, text_key: str, name: str) -> Iterator[Any]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_stream(stream)
        check_column(reader.schema, text_key, name)
        yield from reader
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
