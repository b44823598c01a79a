"""Where the shards of a dataset are when they cannot be read where they lie."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from mpt.data import cache
from mpt.data.fetch import CorruptError, Download, Patience
from mpt.data.hashes import checkable_hashes, wrong_hash
from mpt.data.remote import RefusedError, file_url
from mpt.data.shard import ZippedFile
from mpt.errors import DataError
from mpt.recipe.data import Cache
from mpt.storage import is_url, without_secrets

ZSTD_WINDOW_BYTES = 1 << 27
"""The most that zstd's own levels ask for; also the most memory that a file can make us take."""
BLOCK_BYTES = 1 << 20


class Stored(Protocol):
    """A shard of whatever columns, as an index describes it."""

    @property
    def basename(self) -> str: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def hashes(self) -> dict[str, str]: ...
    @property
    def zipped(self) -> ZippedFile | None: ...


@dataclass(frozen=True)
class Store:
    """Copies of the shards of one dataset."""

    location: str
    """The dataset's directory or URL, with its secrets."""
    settings: Cache
    version: str | None = None
    """Of a remote index: tells copies of shards apart that have no hash."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends all downloads."""

    def open_copy(self, info: Stored, *, wait: bool = True) -> BinaryIO:
        """Return a shard's file, whole and verified: the copy that is there, or a new one.

        The copy is not deleted before the last descriptor of the open file is closed.

        Args:
            wait: for another process that is making it; else BusyError.

        Raises:
            DataError: it cannot be had, or is not what the index says; names the shard.
        """
        try:
            path = self.path_of(info)
            whole = cache.open_whole(path, info.file_bytes)
            if whole is None:
                whole = cache.make(
                    path,
                    info.file_bytes,
                    lambda part: self._fill(part, info, path),
                    wait=wait,
                    stop=self.stop,
                )
        except OSError as error:
            raise DataError(
                f"{self.name(info)}: cannot be kept in {self.settings.dir}: "
                f"{error.strerror or error}; make room there, or set another data.cache.dir."
            ) from error
        return whole

    def path_of(self, info: Stored) -> Path:
        """Return where the copy of a shard is, or will be."""
        folder = cache.open_folder(self.settings.dir)
        return folder / f"{self._key(info)}-{info.file_bytes}.mds"

    def name(self, info: Stored) -> str:
        """Return what messages call a shard: the file in the dataset."""
        return without_secrets(file_url(self.location, (info.zipped or info).basename))

    def _key(self, info: Stored) -> str:
        """Return what tells a copy from those of every other shard."""
        signs: list[object] = [without_secrets(self.location), asdict(cast(Any, info))]
        if is_url(self.location):
            signs.append(None if checkable_hashes(info) else self.version)
        else:
            status = local_file(Path(self.location), (info.zipped or info).basename).stat()
            signs.append([status.st_mtime_ns, status.st_size, status.st_ino])
        return hashlib.sha256(json.dumps(signs).encode()).hexdigest()[:40]

    def _fill(self, part: BinaryIO, info: Stored, path: Path) -> None:
        """Make a shard's copy: from what an interrupted call left, then once more from nothing."""
        patience = Patience(self.settings.timeout_s, self.settings.deadline_s, self.stop)
        attempts = 2 if is_url(self.location) else 1
        for attempts_left in reversed(range(attempts)):
            try:
                if info.zipped is None:
                    self._download(part, info, patience)
                else:
                    self._decompress(part, info, info.zipped, path.with_suffix(".zst"), patience)
                return
            except RefusedError as error:
                raise DataError(f"{self.name(info)}: cannot be fetched: {error}.") from error
            except CorruptError as error:
                part.truncate(0)
                if not attempts_left:
                    raise DataError(
                        f"{self.name(info)}: corrupt shard: {error}; put the right file there, "
                        "or prepare the dataset again."
                    ) from error

    def _download(self, file: BinaryIO, wanted: Stored | ZippedFile, patience: Patience) -> None:
        """Make an open file the one that lies in the dataset."""
        if not checkable_hashes(wanted):
            file.truncate(0)  # what an interrupted call left may be of another version
        self._make_room()
        url, size = file_url(self.location, wanted.basename), wanted.file_bytes
        Download(url, file, size, size, patience).run()
        _check(file, wanted)

    def _decompress(
        self, part: BinaryIO, info: Stored, zipped: ZippedFile, packed: Path, patience: Patience
    ) -> None:
        """Make an open file the shard that lies compressed in the dataset."""
        if not is_url(self.location):
            self._make_room()
            with local_file(Path(self.location), zipped.basename).open("rb") as source:
                _check(source, zipped)
                _unzip(source, part, info)
            return
        with cache.exclusive(packed, wait=True, stop=self.stop) as file:
            try:
                self._download(file, zipped, patience)
                _unzip(file, part, info)
            except CorruptError:
                file.truncate(0)
                raise
            packed.unlink()

    def _make_room(self) -> None:
        if self.settings.limit_bytes is not None:
            cache.evict(cache.open_folder(self.settings.dir), self.settings.limit_bytes)


def local_file(directory: Path, basename: str) -> Path:
    """Return the path of a file in a dataset on this machine.

    Raises:
        DataError: missing, not a regular file, or a link that leads out of the dataset.
    """
    path = directory / basename
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(directory.resolve()):
            raise DataError(f"{path}: a link that leads out of the dataset; put the file here.")
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path}: not a regular file.")
    except OSError as cause:
        raise DataError(f"{path}: cannot be read: {cause.strerror or cause}.") from cause
    return path


def _check(file: BinaryIO, wanted: Stored | ZippedFile) -> None:
    if fault := wrong_hash(file, wanted):
        raise CorruptError(f"of {wanted.basename}, {fault}")


def _unzip(packed: BinaryIO, raw: BinaryIO, info: Stored) -> None:
    """Decompress into an open file, which never gets more bytes than the index states."""
    packed.seek(0)
    raw.truncate(0)
    raw.seek(0)
    left = info.file_bytes
    unzip = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    try:
        with unzip.stream_reader(packed, read_across_frames=True, closefd=False) as reader:
            while block := reader.read(min(BLOCK_BYTES, left + 1)):
                left -= len(block)
                if left < 0:
                    raise CorruptError(
                        f"it decompresses to more than the {info.file_bytes} bytes of the index"
                    )
                raw.write(block)
    except zstandard.ZstdError as error:
        raise CorruptError(f"it cannot be decompressed: {error}") from error
    if left:
        raise CorruptError(
            f"it decompresses to {info.file_bytes - left} bytes; the index says {info.file_bytes}"
        )
    _check(raw, info)
