"""Documents, one after the other, from where a recipe says that the text is."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import zstandard

from mpt.errors import DataError
from mpt.storage import list_files, open_binary, without_secrets

PYTHON_STDLIB = "python-stdlib"
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TEXT_SUFFIX = re.compile(
    r"\.(txt|text|md|rst|tex|html?|xml|ya?ml|toml|proto|pyi?|c|h|cc|cpp|hpp|cu|go|rs"
    r"|java|kt|scala|jsx?|tsx?|css|rb|php|pl|lua|r|jl|hs|swift|cs|sh|sql|lean)"
)
"""Files of a directory that are read as text, one document each; others are passed over."""
LIMIT_DOCUMENT_BYTES = 1 << 28
"""A larger file or line is refused: it is held in memory several times over."""
PIECE_BYTES = 1 << 12
"""A text file named by itself is cut, at blank lines, into documents of at least so much."""

Skip = Callable[[str, str], None]
"""Called with a name and why nothing was taken from it."""


@dataclass(frozen=True)
class Document:
    """One text before tokenizing."""

    name: str
    """Where it comes from, for messages: a file, or a file and a line."""
    text: str
    """Not empty, and valid Unicode."""


class Meter:
    """How much of the files of a source has been read, in bytes on the disk."""

    def __init__(self) -> None:
        self._before = 0
        self._file: BinaryIO | None = None

    @property
    def read_bytes(self) -> int:
        return self._before + (self._file.tell() if self._file else 0)

    def reset(self) -> None:
        """Begin again at the first file."""
        self._before, self._file = 0, None

    @contextmanager
    def reading(self, file: BinaryIO) -> Iterator[None]:
        """Count a file, as far as it is read, until the end of the block."""
        self._file = file
        try:
            yield
        finally:
            self._before, self._file = self.read_bytes, None


def documents(
    source: str, text_key: str, on_skip: Skip, meter: Meter | None = None
) -> Iterator[Document]:
    """Yield the documents of a source, always in the same order.

    Args:
        source: `python-stdlib`; or a file, a directory or a glob pattern, local or fsspec URL.
            Text files are a document each, JSON lines a document per line; either may be .gz
            or .zst. A single text file is cut at blank lines, so that a part can be held out.
        text_key: the key of the text in JSON lines.
        on_skip: told of what is passed over: empty documents, files that are no text, and
            modules of the standard library that do not decode.
        meter: kept up to date with what is read.

    Raises:
        DataError: no such source, a text that is not UTF-8, a line that is not JSON, a key that
            is missing; names file, line, and byte where there is one.
    """
    meter = meter or Meter()
    if source == PYTHON_STDLIB:
        found = _stdlib(on_skip, meter)
    else:
        found = _files(source, text_key, on_skip, meter)
    for document in found:
        if document.text:
            yield document
        else:
            on_skip(document.name, "empty")


def files_of(source: str) -> list[str]:
    """Return the files of a source in the order they are read, also those that are passed over."""
    if source != PYTHON_STDLIB:
        return list_files(source)
    root = Path(sysconfig.get_path("stdlib"))
    return [str(root / name) for name in sorted(_modules(root), key=PurePosixPath.as_posix)]


def is_read(file: str, source: str) -> bool:
    """Say whether a file of a source is read: by its name, or because it is the source."""
    suffix = _inner_suffix(file)
    return file == source or suffix == ".jsonl" or bool(TEXT_SUFFIX.fullmatch(suffix))


def _stdlib(on_skip: Skip, meter: Meter) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in files_of(PYTHON_STDLIB):
        name = Path(file).relative_to(root).as_posix()
        try:
            with tokenize.open(file) as text, meter.reading(text.buffer):
                yield Document(name, text.read())  # decoded as PEP 263 has it
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            on_skip(name, f"not decodable ({type(error).__name__})")


def _modules(root: Path) -> Iterator[PurePosixPath]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        within = PurePosixPath(Path(folder).relative_to(root))
        yield from (within / name for name in names if name.endswith(".py"))


def _files(source: str, text_key: str, on_skip: Skip, meter: Meter) -> Iterator[Document]:
    for file in files_of(source):
        name, suffix = without_secrets(file), _inner_suffix(file)
        if not is_read(file, source):
            on_skip(name, "not a text file")
            continue
        with (
            closing(open_binary(file)) as raw,
            closing(_decompress(raw, file)) as stream,
            meter.reading(raw),
        ):
            try:
                if suffix == ".jsonl":
                    yield from _json_lines(stream, name, text_key)
                elif file == source:
                    yield from _pieces(stream, name)
                else:
                    yield Document(name, _decode(_read_whole(stream, name), name))
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                raise DataError(f"{name}: cannot be read: {error}") from error


def _inner_suffix(file: str) -> str:
    """Return the suffix below a compression's: .jsonl for x.jsonl.zst."""
    path = PurePosixPath(file.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _decompress(raw: BinaryIO, file: str) -> BinaryIO:
    match PurePosixPath(file.lower()).suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(_ZstdStream(raw), 1 << 20)
        case _:
            return raw


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd frames; unlike zstandard's own reader, it notices a missing end."""

    CHUNK_BYTES = 1 << 14  # 4 bytes may hold 128 KiB, so this bounds memory at half a GiB

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._within_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            chunk = self._frame.unused_data or self._raw.read(self.CHUNK_BYTES)
            if not chunk:
                if self._within_frame:
                    raise EOFError("the compressed file ends too early; it is truncated")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._within_frame = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _json_lines(stream: BinaryIO, file: str, text_key: str) -> Iterator[Document]:
    number = 0
    while line := stream.readline(LIMIT_DOCUMENT_BYTES + 1):
        number += 1
        name = f"{file}:{number}"
        _refuse_if_too_large(line, name)
        text = _decode(line, name)
        if not text.isspace():
            yield Document(name, _text_of(text, name, text_key))


def _text_of(line: str, name: str, text_key: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not a line of JSON: {error}.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get(text_key), str):
        keys = ", ".join(list(entry)[:10]) if isinstance(entry, dict) else "not an object"
        raise DataError(
            f"{name}: no text under the key {text_key!r} (seen: {keys:.200}); "
            "set prepare.text_key to the one that holds the text."
        )
    text: str = entry[text_key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: half a surrogate pair at character {error.start} is no text."
        ) from error
    return text


def _pieces(stream: BinaryIO, file: str) -> Iterator[Document]:
    """Cut a text at the blank lines that come after each PIECE_BYTES."""
    piece, size, start, number = bytearray(), 0, 1, 0
    while line := stream.readline(LIMIT_DOCUMENT_BYTES + 1):
        number += 1
        piece += line
        _refuse_if_too_large(piece, f"{file}:{start}")
        if len(piece) >= PIECE_BYTES and not line.strip():
            yield Document(f"{file}:{start}", _decode(piece, file, size))
            size += len(piece)
            piece, start = bytearray(), number + 1
    if piece:
        yield Document(f"{file}:{start}", _decode(piece, file, size))


def _read_whole(stream: BinaryIO, file: str) -> bytes:
    payload = stream.read(LIMIT_DOCUMENT_BYTES + 1)
    _refuse_if_too_large(payload, file)
    return payload


def _refuse_if_too_large(payload: bytes | bytearray, name: str) -> None:
    if len(payload) > LIMIT_DOCUMENT_BYTES:
        raise DataError(
            f"{name}: one document of more than {LIMIT_DOCUMENT_BYTES} bytes; cut it into several. "
            "A text file that is the source by itself is cut at blank lines."
        )


def _decode(payload: bytes | bytearray, name: str, before: int = 0) -> str:
    """Return the text of UTF-8 bytes, `before` of the file before them; drops a leading mark."""
    try:
        return payload.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {before + error.start} is 0x{payload[error.start]:02x}, which is not "
            "UTF-8; convert the file to UTF-8, or leave it out."
        ) from error
