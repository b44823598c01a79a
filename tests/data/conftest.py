"""A small dataset on a server that fails on command, and retries that do not wait long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mpt.data import fetch
from tests.data.faults import FaultyServer, serving, small_dataset


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts, and no proxy before this machine."""
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path, quick: None) -> Iterator[FaultyServer]:
    """Serves `tmp_path/set`."""
    small_dataset(tmp_path / "set")
    with serving(tmp_path / "set") as state:
        yield state
