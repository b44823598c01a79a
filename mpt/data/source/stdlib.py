"""The standard library of the Python that runs this, a document per module."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mpt.data.source.document import Document, Meter, Skip

NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def modules() -> list[str]:
    """Return the files, sorted by their place in the library."""
    root = Path(sysconfig.get_path("stdlib"))
    return [str(root / name) for name in sorted(_walk(root), key=PurePosixPath.as_posix)]


def read(on_skip: Skip, meter: Meter) -> Iterator[Document]:
    """Yield the modules; those that do not decode are passed over."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in modules():
        name = Path(file).relative_to(root).as_posix()
        try:
            with tokenize.open(file) as text, meter.reading(text.buffer.tell):
                yield Document(name, text.read())  # decoded as PEP 263 has it
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            on_skip(name, f"not decodable ({type(error).__name__})")


def _walk(root: Path) -> Iterator[PurePosixPath]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_STDLIB]
        within = PurePosixPath(Path(folder).relative_to(root))
        yield from (within / name for name in names if name.endswith(".py"))
