"""Libraries that only some sources need, and what to install where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpt.errors import DataError


@contextmanager
def needed(extra: str, what: str) -> Iterator[None]:
    """Turn a failed import within the block into a DataError that names the extra."""
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"{what}: reading it takes a library that is not here ({error}); "
            f"pip install 'mpt-train[{extra}]'."
        ) from error
