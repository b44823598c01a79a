"""Checkpoints to load and to damage, and memory that outlives ranks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpt.launch.pulse import anonymous_file
from tests.dist.saving import STEPS, Files, Saved, save_all
from tests.world import on_ranks


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    return tmp_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Three checkpoints that two ranks wrote; copied before anyone damages them."""
    root = tmp_path_factory.mktemp("saved")
    (root / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    (digests, _), _ = on_ranks(2, save_all, root, STEPS)
    return root, digests


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Path:
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def files() -> Iterator[Files]:
    descriptors = [anonymous_file("mpt-test") for _ in range(2)]
    yield [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
