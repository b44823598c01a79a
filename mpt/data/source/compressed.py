"""Files that may be compressed, read as what they hold."""

from __future__ import annotations

import gzip
import io
from pathlib import PurePosixPath
from typing import BinaryIO

import zstandard

from mpt.storage import without_secrets

SUFFIXES = (".gz", ".zst")


def inner_suffix(file: str) -> str:
    """Return the suffix of a file or URL below a compression's: .jsonl for x.jsonl.zst."""
    path = PurePosixPath(without_secrets(file).lower())
    return PurePosixPath(path.stem).suffix if path.suffix in SUFFIXES else path.suffix


def decompress(raw: BinaryIO, file: str) -> BinaryIO:
    """Return a stream of what a file holds, by the last suffix of its name."""
    match PurePosixPath(without_secrets(file).lower()).suffix:
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
