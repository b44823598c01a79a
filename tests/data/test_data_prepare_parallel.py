"""Laws of prepare with workers: the same bytes by any number, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.data.plan import Progress
from mpt.data.prepare import prepare
from mpt.errors import DataError
from tests.data.cases import (
    files_of,
    recipe_for,
    some_texts,
    write_texts,
    write_tokenizer,
)
from tests.data.processes import Watched, children_of, stopped_prepare


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts", some_texts(60))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 700)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, corpus: Path, workers: int
) -> None:
    prepare(recipe_for(tmp_path / "one", corpus), workers=1)
    seen: set[int] = set()
    prepare(
        recipe_for(tmp_path / "many", corpus),
        workers=workers,
        progress=lambda _: seen.update(children_of(os.getpid())),
    )
    assert len(seen) == workers
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    assert not seen & set(children_of(os.getpid()))


def test_one_batch_starts_no_process(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 1 << 20)
    before = set(children_of(os.getpid()))
    seen: set[int] = set()
    prepare(
        recipe_for(tmp_path / "out", corpus),
        workers=2,
        progress=lambda _: seen.update(children_of(os.getpid())),
    )
    assert seen <= before


def test_a_worker_that_is_killed_ends_the_call_and_the_next_one_goes_on(
    tmp_path: Path, corpus: Path
) -> None:
    prepare(recipe_for(tmp_path / "clean", corpus), workers=1)
    recipe = recipe_for(tmp_path / "out", corpus)

    def kill_workers(seen: Progress) -> None:
        if seen.tokens > 1500:
            for worker in children_of(os.getpid()):
                os.kill(worker, signal.SIGKILL)

    with pytest.raises(DataError, match=r"\.txt to .*\.txt: the process .* was killed by signal 9"):
        prepare(recipe, workers=2, progress=kill_workers)
    assert children_of(os.getpid()) == []
    assert (tmp_path / "out" / "train.partial" / "shard.00000.mds").exists()
    prepare(recipe, workers=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(
    tmp_path: Path, corpus: Path, sent: signal.Signals
) -> None:
    with stopped_prepare(tmp_path / "out", corpus, workers=2) as process:
        assert process is not None
        children = children_of(process.pid)
        assert len(children) == 2
        watched = Watched(children)
        process.send_signal(sent)
        assert watched.all_end()
        assert process.wait(timeout=30) != 0
    assert (tmp_path / "out" / "train.partial" / "shard.00000.mds").exists()


def test_workers_import_no_torch() -> None:
    probe = "import sys, mpt.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_what_a_worker_cannot_do_is_said_with_its_documents(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    write_tokenizer(tmp_path / "out" / "tokenizer.model")

    def change_tokenizer(seen: Progress) -> None:
        if seen.stage == "resuming":
            (tmp_path / "out" / "tokenizer.model").write_bytes(b"no tokenizer")

    with stopped_prepare(tmp_path / "out", corpus, workers=1) as process:
        assert process is not None
    with pytest.raises(DataError, match=r"tokenizer\.model: not a sentencepiece model"):
        prepare(recipe, workers=2, progress=change_tokenizer)
