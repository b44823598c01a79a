"""Delta Lake tables: the rows of one version, in the order in which their files were added.

The `deltalake` package reads the log and lists the data files of the version; these are parquet,
and read as such, a few rows at a time. Files come by the time and then the path that the log has
for them, rows as they lie in a file: an order that neither a checkpoint of the log nor the machine
changes, and in which a table that was appended to begins as it did before. `DeltaTable.scan` reads
rows in no fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from mpt.data.source import parquet
from mpt.data.source.column import check_column, documents_of
from mpt.data.source.document import Document, Meter, Skip
from mpt.data.source.extras import needed
from mpt.data.source.filtering import expression
from mpt.data.source.look import Looked
from mpt.data.source.opened import open_within
from mpt.errors import DataError
from mpt.recipe.delta import Delta
from mpt.recipe.predicate import columns_of, parse_predicate
from mpt.storage import without_secrets

READABLE = {"deletionVectors", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
"""Features of tables that a reader must know, and that we do."""
ROW = "mpt: row"
"""A column of our own: where in its file a row is."""


@dataclass(frozen=True)
class _File:
    """A data file of a version."""

    path: str
    """Within the table."""
    size: int
    added: int
    """When, in milliseconds since 1970, by the log."""
    partition: dict[str, Any]
    """Values of the columns that are not in the file."""
    kept: Any
    """Arrow's array of bool, whether each row is not deleted; null where none is."""


def newest_version(location: str) -> int:
    """Return the number of the newest version of a table."""
    return int(_open(location, Delta()).version())


def pinned(location: str, selection: Delta) -> Delta:
    """Return the selection with the version that it means now, as a number."""
    if selection.version is not None:
        return selection
    version = int(_open(location, selection).version())
    return replace(selection, version=version, timestamp=None)


def check(location: str, selection: Delta) -> None:
    """Raise DataError if the version that is selected cannot be read."""
    _open(location, selection)


def look(location: str, selection: Delta) -> Iterator[Looked]:
    """Yield what the documents are a function of: the table, its files, the version, the rows."""
    table = _open(location, selection)
    signs = f"{table.metadata().id} {table.version()} {selection.predicate}"
    yield Looked("table", None, signs, is_read=False)
    for file in _files(table, without_secrets(location)):
        yield Looked(file.path, file.size, str(file.added))


def read(
    location: str, text_key: str, selection: Delta, on_skip: Skip, meter: Meter
) -> Iterator[Document]:
    """Yield the documents in one column, of the rows that are selected."""
    table, name = _open(location, selection), without_secrets(location)
    import pyarrow as pa

    schema = pa.schema(table.schema())
    check_column(schema, text_key, name)
    chosen = _Chosen(schema, text_key, selection.predicate, name)
    for file in _files(table, name):
        if chosen.leaves_out(file):
            continue
        where = f"{name.rstrip('/')}/{file.path}"
        # deltalake's own way of reading files holds Python's lock while it waits for a server.
        with _blamed(where, "was it removed by VACUUM?"):
            raw = open_within(location, file.path)
        with closing(raw):
            opened = parquet.open_file(raw, where)
            yield from _read_file(opened, file, chosen, where, on_skip, meter)


def _read_file(
    opened: Any, file: _File, chosen: _Chosen, where: str, on_skip: Skip, meter: Meter
) -> Iterator[Document]:
    n_rows = opened.metadata.num_rows
    lying = [column for column in chosen.columns if column in opened.schema_arrow.names]
    if file.kept is not None and len(file.kept) > n_rows:
        raise DataError(f"{where}: has {n_rows} rows; its deletion vector has {len(file.kept)}.")
    with meter.rows(file.size, n_rows) as seen:
        # With no column that is in the file, its rows are still counted: by the first one there is.
        columns = lying or opened.schema_arrow.names[:1]
        for first, batch in parquet.batches(opened, where, chosen.text_key, columns):
            seen(first + batch.num_rows)
            column, rows = chosen.of(batch, first, file, where)
            yield from documents_of(column, where, rows, on_skip)


class _Chosen:
    """The column and the rows that are to be read."""

    def __init__(self, schema: Any, text_key: str, predicate: str | None, name: str) -> None:
        self.text_key = text_key
        self._schema = schema
        condition = parse_predicate(predicate) if predicate else None
        wanted = columns_of(condition) if condition else set()
        if unknown := sorted(wanted - set(schema.names)):
            raise DataError(
                f"{name}: prepare.delta.predicate: no column {', '.join(unknown)}; there are: "
                f"{', '.join(schema.names[:20]):.400}."
            )
        self.columns = sorted({text_key, *wanted})
        self._wanted = wanted
        self._condition = expression(condition, schema) if condition else None
        self._name = name

    def leaves_out(self, file: _File) -> bool:
        """Say whether no row of a file is chosen, by the values of its partition alone."""
        if self._condition is None or not self._wanted <= file.partition.keys():
            return False
        return len(self._filter(self._table({}, file, 1), self._name)) == 0

    def of(self, batch: Any, first: int, file: _File, where: str) -> tuple[Any, list[int]]:
        """Return the texts that are chosen of a batch, and the number of each one's row."""
        import pyarrow as pa

        rows = pa.array(range(first, first + batch.num_rows), pa.int64())
        table = self._table(dict(zip(batch.schema.names, batch.columns, strict=True)), file, rows)
        if file.kept is not None:
            kept = file.kept.slice(first, batch.num_rows)
            missing = batch.num_rows - len(kept)  # what lies after the last that is deleted
            table = table.filter(pa.concat_arrays([kept, pa.array([True] * missing, pa.bool_())]))
        if self._condition is not None:
            table = self._filter(table, where)
        column = table.column(self.text_key).combine_chunks()
        return column, table.column(ROW).to_pylist()

    def _table(self, lying: dict[str, Any], file: _File, rows: Any) -> Any:
        """Return the wanted columns, with those that are in no file, or not yet in this one."""
        import pyarrow as pa

        count = rows if isinstance(rows, int) else len(rows)
        found = {}
        for column in self.columns:
            kind = self._schema.field(column).type
            if column not in lying:
                found[column] = pa.repeat(pa.scalar(file.partition.get(column), kind), count)
                continue
            try:
                found[column] = lying[column].cast(kind)  # a file may have another kind of text
            except pa.ArrowException as error:
                raise DataError(f"{self._name}/{file.path}: {column}: {error}") from error
        return pa.table(found | ({} if isinstance(rows, int) else {ROW: rows}))

    def _filter(self, table: Any, where: str) -> Any:
        import pyarrow as pa

        try:
            return table.filter(self._condition)
        except pa.ArrowException as error:
            raise DataError(f"{where}: prepare.delta.predicate: {error}") from error


def _open(location: str, selection: Delta) -> Any:
    """Return the table at the version that is selected."""
    name = without_secrets(location)
    with needed("delta", name):
        import pyarrow  # noqa: F401
        from deltalake import DeltaTable
    with _blamed(name):
        if selection.timestamp is None:
            table = DeltaTable(location, version=selection.version)
        else:
            table = DeltaTable(location)
            _load_at(table, selection.timestamp, name)
        _check_readable(table, name)
        return table


def _load_at(table: Any, timestamp: str, name: str) -> None:
    when = datetime.fromisoformat(timestamp)
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    made_ms = [entry["timestamp"] for entry in table.history() if "timestamp" in entry]
    table.load_as_version(when)
    # Of a time before all versions, deltalake makes the first one.
    if made_ms and when.timestamp() * 1000 < min(made_ms):
        raise DataError(
            f"{name}: prepare.delta.timestamp: the table had no version yet at {timestamp}."
        )


def _check_readable(table: Any, name: str) -> None:
    protocol = table.protocol()
    unknown = sorted({*(protocol.reader_features or ())} - READABLE)
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        unknown = sorted({*unknown, "columnMapping"})
    if unknown or protocol.min_reader_version > 3:
        what = ", ".join(unknown) or f"reader version {protocol.min_reader_version}"
        raise DataError(
            f"{name}: the table uses {what}, which is not read here; write the rows you want to "
            "parquet or to another table, and name that."
        )


def _files(table: Any, name: str) -> list[_File]:
    """Return the data files of a version, in the order they are read."""
    import pyarrow as pa

    with _blamed(name):
        found = pa.table(table.get_add_actions())
        kept = _kept_rows(table)
    has = "partition" in found.schema.names
    columns = ["path", "size_bytes", "modification_time", *(["partition"] if has else [])]
    files = []
    for entry in found.select(columns).to_pylist():
        path = unquote(entry["path"])
        if "://" in entry["path"] or path.startswith("/") or ".." in path.split("/"):
            raise DataError(f"{name}: its file {path:.200} lies outside of the table.")
        mask = kept.pop(_plain(path), None)
        partition = entry.get("partition") or {}
        files.append(_File(path, entry["size_bytes"], entry["modification_time"], partition, mask))
    if kept:
        raise DataError(f"{name}: a deletion vector of no file: {min(kept):.200}.")
    return sorted(files, key=lambda file: (file.added, file.path))


def _kept_rows(table: Any) -> dict[str, Any]:
    """Return, for each file of which rows are deleted, which are not."""
    import pyarrow as pa

    if "deletionVectors" not in (table.protocol().reader_features or ()):
        return {}
    found = {}
    for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors()):
        for uri, rows in zip(batch.column(0).to_pylist(), batch.column(1), strict=True):
            found[_plain(uri)[len(_plain(table.table_uri).rstrip("/")) + 1 :]] = rows.values
    return found


def _plain(path: str) -> str:
    """Return a path as it is after every quoting: the log and the library quote differently."""
    while (unquoted := unquote(path)) != path:
        path = unquoted
    return path


@contextmanager
def _blamed(where: str, remedy: str = "") -> Iterator[None]:
    """Turn what the library raises into a DataError; its text may hold lines and colours."""
    try:
        yield
    except Exception as error:  # the library's errors are of several kinds
        if isinstance(error, DataError) and not remedy:
            raise
        said = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
        raise DataError(f"{where}: cannot be read: {said:.400}; {remedy}".rstrip("; ")) from error
