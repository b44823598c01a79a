"""JSON lines: a document per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from mpt.data.source import document
from mpt.data.source.document import MARK, Document, check_unicode, decode, refuse_if_too_large
from mpt.errors import DataError


def json_lines(stream: BinaryIO, file: str, text_key: str) -> Iterator[Document]:
    """Yield the text under `text_key` of each line that is not blank."""
    number = 0
    while line := stream.readline(document.LIMIT_DOCUMENT_BYTES + 1):
        number += 1
        name = f"{file}:{number}"
        refuse_if_too_large(len(line), name)
        text = decode(line, name).removeprefix(MARK)
        if not text.isspace():
            yield Document(name, _text_of(text, name, text_key))


def _text_of(line: str, name: str, text_key: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not a line of JSON: {error}.") from error
    if isinstance(entry, dict) and text_key in entry and entry[text_key] is None:
        return ""  # passed over and counted, as a null in a table is
    if not isinstance(entry, dict) or not isinstance(entry.get(text_key), str):
        keys = ", ".join(list(entry)[:10]) if isinstance(entry, dict) else "not an object"
        raise DataError(
            f"{name}: no text under the key {text_key!r} (seen: {keys:.200}); "
            "set prepare.text_key to the one that holds the text."
        )
    return check_unicode(entry[text_key], name)
