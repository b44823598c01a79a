"""MDS datasets with a column of text, as mosaicml-streaming writes them, as a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mpt.data.descriptions import Descriptions, read_descriptions
from mpt.data.index import INDEX_NAME, parse_text_index
from mpt.data.shard import COLUMN
from mpt.data.source.document import (
    Document,
    Meter,
    Skip,
    check_unicode,
    decode,
    refuse_if_too_large,
)
from mpt.data.source.look import Looked, look_at
from mpt.data.store import local_file
from mpt.data.textshard import TEXT_ENCODINGS, TextShard, TextShardInfo
from mpt.errors import DataError
from mpt.recipe.data import Cache
from mpt.storage import is_url, without_secrets


def look(location: str, cache: Cache) -> Iterator[Looked]:
    """Yield what the index is, and where that can be had, what the files are."""
    files = read_descriptions(location, cache)
    digest = hashlib.sha256(files.index).hexdigest()
    yield Looked(INDEX_NAME, None, f"{digest} {files.store.version}", is_read=False)
    for shard in _shards(files, location):
        stored = shard.zipped or shard
        if is_url(location):  # its hash is in the index
            yield Looked(stored.basename, stored.file_bytes, "")
        else:
            yield look_at(str(local_file(Path(location), stored.basename)))


def read(
    location: str, text_key: str, cache: Cache, on_skip: Skip, meter: Meter
) -> Iterator[Document]:
    """Yield the documents of all shards, in the order of the index."""
    files = read_descriptions(location, cache)
    shards = _shards(files, location)
    numbers = [_column(shard, text_key, without_secrets(location)) for shard in shards]
    for shard, number in zip(shards, numbers, strict=True):
        name, encoding = files.store.name(shard), shard.columns[number].encoding
        with meter.rows((shard.zipped or shard).file_bytes, shard.samples) as seen:
            opened = _open(files, shard, location)
            for row, payload in enumerate(opened.payloads(number), start=1):
                seen(row)
                yield Document(f"{name}:{row}", _text(payload, encoding, f"{name}:{row}"))


def _shards(files: Descriptions, location: str) -> tuple[TextShardInfo, ...]:
    return parse_text_index(files.index, f"{without_secrets(location)}/{INDEX_NAME}")


def _column(shard: TextShardInfo, text_key: str, where: str) -> int:
    """Return which column holds the text."""
    names = [column.name for column in shard.columns]
    texts = [column.name for column in shard.columns if column.encoding in TEXT_ENCODINGS]
    if text_key in texts:
        return names.index(text_key)
    if COLUMN in names:
        raise DataError(
            f"{where}: is tokenized already (it has a column `{COLUMN}`): name it in data.streams "
            "and drop `prepare:`."
        )
    seen = ", ".join(f"{column.name} ({column.encoding})" for column in shard.columns)
    raise DataError(
        f"{where}: no column {text_key!r} of {', '.join(TEXT_ENCODINGS)} (there are: {seen:.400}); "
        "set prepare.text_key to the one that holds the text."
    )


def _open(files: Descriptions, shard: TextShardInfo, location: str) -> TextShard:
    """Map a shard, by way of a verified copy where it is remote or compressed."""
    name = files.store.name(shard)
    if is_url(location) or shard.zipped:
        return TextShard(name, shard, files.store.open_copy(shard))
    return TextShard(local_file(Path(location), shard.basename), shard)


def _text(payload: bytes, encoding: str, name: str) -> str:
    refuse_if_too_large(len(payload), name)
    text = decode(payload, name)
    if encoding != "json":
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON: {error}.") from error
    if not isinstance(value, str):
        raise DataError(f"{name}: a JSON {type(value).__name__}, not a text.")
    return check_unicode(value, name)
