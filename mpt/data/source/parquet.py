"""Parquet files, a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from mpt.data.source import document
from mpt.data.source.column import check_column, documents_of
from mpt.data.source.document import Document, Meter, Skip, refuse_if_too_large
from mpt.data.source.extras import needed
from mpt.errors import DataError

BATCH_ROWS = 1024
BATCH_BYTES = 1 << 30
"""The most that rows decoded at a time may take, unless it is a single one: where the values of a
row group lie in a dictionary, each row could be as large as all of it."""
BUFFER_BYTES = 1 << 20


def read_file(
    raw: BinaryIO, name: str, text_key: str, on_skip: Skip, meter: Meter
) -> Iterator[Document]:
    """Yield the documents in one column of an open file."""
    with needed("parquet", name):
        file = open_file(raw, name)
    check_column(file.schema_arrow, text_key, name)
    with meter.rows(raw.seek(0, os.SEEK_END), file.metadata.num_rows) as seen:
        for first, batch in batches(file, name, text_key, [text_key]):
            rows = range(first, first + batch.num_rows)
            seen(rows.stop)
            yield from documents_of(batch.column(0), name, rows, on_skip)


def open_file(raw: Any, name: str) -> Any:
    """Return pyarrow's view of an open file.

    Raises:
        DataError: it is no parquet file.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(raw, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read as parquet: {error}") from error


def batches(
    file: Any, name: str, text_key: str, columns: Sequence[str]
) -> Iterator[tuple[int, Any]]:
    """Yield some columns of a file in batches, each with the number of its first row.

    Raises:
        DataError: damaged, or with a row group whose texts are too long to be read; names it.
    """
    import pyarrow as pa

    first = 0
    for group in range(file.metadata.num_row_groups):
        about = file.metadata.row_group(group)
        _refuse_if_giant(about, name, text_key, first)
        rows = BATCH_BYTES // max(1, _uncompressed_bytes(about, columns))
        found = file.iter_batches(
            min(max(1, rows), BATCH_ROWS), [group], columns=list(columns), use_threads=False
        )
        while True:
            try:
                batch = next(found, None)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{name}:{first + 1}: cannot be read: {error}") from error
            if batch is None:
                break
            yield first, batch
            first += batch.num_rows


def _refuse_if_giant(group: Any, name: str, text_key: str, first: int) -> None:
    """Refuse what is known before it is read: texts that are too long on average."""
    size, rows = _uncompressed_bytes(group, [text_key]), max(1, group.num_rows)
    if size // rows > document.LIMIT_DOCUMENT_BYTES:
        where = f"{name}:{first + 1}" + (f" to {first + rows}" if rows > 1 else "")
        refuse_if_too_large(size // rows, where)


def _uncompressed_bytes(group: Any, columns: Sequence[str]) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema in columns or chunk.path_in_schema.split(".")[0] in columns
    )
