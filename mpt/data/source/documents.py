"""Documents, one after the other, from where a recipe says that the text is."""

from __future__ import annotations

from collections.abc import Iterator

from mpt.data.source import delta, files, mds, saved, stdlib
from mpt.data.source.document import Document, Meter, Skip
from mpt.data.source.look import Looked, look_at
from mpt.data.source.place import Source


def documents(source: Source, on_skip: Skip, meter: Meter | None = None) -> Iterator[Document]:
    """Yield the documents of a source, always in the same order.

    Args:
        on_skip: told of what is passed over: documents that are empty or null, files that are no
            text, and modules of the standard library that do not decode.
        meter: kept up to date with what is read.

    Raises:
        DataError: no such source, a text that is not UTF-8 or too long, a line that is not JSON, a
            key or column that is missing, a library that is; names file, line or row, and byte
            where there is one.
    """
    for document in _read(source, on_skip, meter or Meter()):
        if document.text:
            yield document
        else:
            on_skip(document.name, "empty")


def look(source: Source) -> Iterator[Looked]:
    """Yield all that the documents of a source are a function of, without reading them.

    Raises:
        DataError: no such source, or one that is gone meanwhile.
    """
    match source.kind:
        case "stdlib":
            yield from map(look_at, stdlib.modules())
        case "files":
            yield from files.look(source.location)
        case "saved":
            yield from saved.look(source.location)
        case "mds":
            yield from mds.look(source.location, source.cache)
        case "delta":
            yield from delta.look(source.location, source.selection)


def _read(source: Source, on_skip: Skip, meter: Meter) -> Iterator[Document]:
    where, text_key = source.location, source.text_key
    match source.kind:
        case "stdlib":
            return stdlib.read(on_skip, meter)
        case "files":
            return files.read(where, text_key, on_skip, meter)
        case "saved":
            return saved.read(where, text_key, on_skip, meter)
        case "mds":
            return mds.read(where, text_key, source.cache, on_skip, meter)
        case "delta":
            return delta.read(where, text_key, source.selection, on_skip, meter)
