"""Columns of Arrow record batches as documents, for all formats that come as such batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mpt.data.source.document import Document, Skip, decode, refuse_if_too_large
from mpt.errors import DataError


def check_column(schema: Any, text_key: str, name: str) -> None:
    """Refuse a schema without that column, or with one that is no text.

    Raises:
        DataError: names the columns that could be meant.
    """
    if (count := schema.names.count(text_key)) != 1:
        what = "no column" if not count else "more than one column"
        seen = ", ".join(schema.names[:20])
        raise DataError(
            f"{name}: {what} {text_key!r} (there are: {seen:.400}); "
            "set prepare.text_key to the one that holds the text."
        )
    if not _is_text(schema.field(text_key).type):
        found = [field.name for field in schema if _is_text(field.type)]
        raise DataError(
            f"{name}: the column {text_key!r} holds {schema.field(text_key).type}, not text; set "
            f"prepare.text_key to one that does: {', '.join(found[:20]) or 'there is none'}."
        )


def documents_of(column: Any, name: str, rows: range | list[int], skip: Skip) -> Iterator[Document]:
    """Yield the texts of one array, each named by its row, counted from 1.

    Args:
        rows: where in the file each value is from, counted from 0.

    Raises:
        DataError: a text that is too long or not UTF-8; names file and row.
    """
    import pyarrow.compute as pc

    for size, row in zip(pc.binary_length(_plain(column)).to_pylist(), rows, strict=True):
        refuse_if_too_large(size or 0, f"{name}:{row + 1}")
    for value, row in zip(_plain(column).to_pylist(), rows, strict=True):
        where = f"{name}:{row + 1}"
        if value is None:
            skip(where, "null")
        else:
            yield Document(where, decode(value, where))


def _plain(column: Any) -> Any:
    """Return an array of bytes: text is decoded by us, to name what is no UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if pa.types.is_large_binary(column.type) else column.cast(pa.large_binary())


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in {
        *("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    }
