"""Laws of prepare with workers: the same bytes by any number, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpt.data import pool
from mpt.data.batches import Batch, batches
from mpt.data.encode import Encoder
from mpt.data.plan import Progress
from mpt.data.pool import PER_WORKER, Work, encoded
from mpt.data.prepare import prepare
from mpt.data.source import Document, Meter
from mpt.data.words import LIMIT_WORD_CHARACTERS
from mpt.errors import DataError
from mpt.tokenizer import load_tokenizer
from tests.data.cases import (
    files_of,
    recipe_for,
    some_texts,
    write_texts,
    write_tokenizer,
)
from tests.data.processes import Watched, stopped_prepare, workers_of


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
        progress=lambda _: seen.update(workers_of(os.getpid())),
    )
    assert len(seen) == workers
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    assert not seen & set(workers_of(os.getpid()))


def test_one_batch_starts_no_process(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 1 << 20)
    before = set(workers_of(os.getpid()))
    seen: set[int] = set()
    prepare(
        recipe_for(tmp_path / "out", corpus),
        workers=2,
        progress=lambda _: seen.update(workers_of(os.getpid())),
    )
    assert seen <= before


def test_a_worker_that_is_killed_ends_the_call_and_the_next_one_goes_on(
    tmp_path: Path, corpus: Path
) -> None:
    prepare(recipe_for(tmp_path / "clean", corpus), workers=1)
    recipe = recipe_for(tmp_path / "out", corpus)

    def kill_workers(seen: Progress) -> None:
        if seen.tokens > 1500:
            for worker in workers_of(os.getpid()):
                os.kill(worker, signal.SIGKILL)

    with pytest.raises(DataError, match=r"\.txt to .*\.txt: the process .* was killed by signal 9"):
        prepare(recipe, workers=2, progress=kill_workers)
    assert workers_of(os.getpid()) == []
    assert (tmp_path / "out" / "train.partial" / "shard.00000.mds").exists()
    prepare(recipe, workers=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_a_worker_that_is_stopped_ends_the_call_and_is_named(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)

    def stop_workers(seen: Progress) -> None:
        if seen.tokens > 1500:
            monkeypatch.setattr(pool, "PATIENCE_S", 1.0)
            for worker in workers_of(os.getpid()):
                os.kill(worker, signal.SIGSTOP)

    words = r"\.txt to .*\.txt: the process .*, \d+ \(it is stopped\), has not answered for 1 s"
    with pytest.raises(DataError, match=words):
        prepare(recipe, workers=2, progress=stop_workers)
    assert workers_of(os.getpid()) == []
    prepare(recipe, workers=1)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(
    tmp_path: Path, corpus: Path, sent: signal.Signals
) -> None:
    with stopped_prepare(tmp_path / "out", corpus, workers=2) as process:
        assert process is not None
        children = workers_of(process.pid)
        assert len(children) == 2
        watched = Watched(children)
        process.send_signal(sent)
        assert watched.all_end()
        assert process.wait(timeout=30) != 0
    assert (tmp_path / "out" / "train.partial" / "shard.00000.mds").exists()


def test_workers_that_cannot_be_started_are_an_error_that_leaves_none(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DataError, match=r"process 1 of 2 cannot be started: .*fewer --workers"):
        prepare(recipe_for(tmp_path / "out", corpus), workers=2)
    assert workers_of(os.getpid()) == []


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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_cannot_be_tokenized_is_named(tmp_path: Path, workers: int) -> None:
    word = "y" * (LIMIT_WORD_CHARACTERS + 1)
    source = tmp_path / "texts.jsonl"
    texts = [*some_texts(4), word, *some_texts(4)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = recipe_for(tmp_path / "out", source)
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    with pytest.raises(DataError, match=r"to .*texts\.jsonl:5: \d+ characters without a space"):
        prepare(recipe, workers=workers)


def test_a_batch_holds_no_more_than_so_much_text_or_so_many_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpt.data.batches.BATCH_DOCUMENTS", 3)
    found = [Document(f"x:{number}", "y" * 10) for number in range(7)]
    cut = list(batches([*found, Document("long", "y" * 9000), *found[:1]], Meter()))
    assert [len(batch.texts) for batch in cut] == [3, 3, 2, 1]
    assert [batch.number for batch in cut] == [0, 1, 2, 3]
    assert [(batch.first, batch.last) for batch in cut][1:3] == [("x:3", "x:5"), ("x:6", "long")]


@pytest.mark.parametrize("most_bytes", [1 << 28, 250])
def test_reading_does_not_run_ahead_of_what_is_packed(
    tmp_path: Path, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt.data.pool.IN_FLIGHT_BYTES", most_bytes)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.model")
    read = 0

    def work() -> Work:
        nonlocal read
        for number in range(30):
            read += 1
            yield Batch(number, [b"x" * 100], ["name"], 0), ["train"]

    encoder = Encoder(load_tokenizer(tokenizer), 0.0)
    most = min(PER_WORKER * 2, most_bytes // 100)
    for batch, result in encoded(work(), encoder, tokenizer, 2):
        assert read - batch.number <= most + 1
        assert result["train"].documents == 1
    assert batch.number == 29


FIVE_GB = 5 << 30
LARGEST_GIB = 1.5

MEMORY_OF_PREPARE = """
import resource, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from mpt.data.pool import PER_WORKER, Work, encoded
from mpt.data.prepare import prepare
from mpt.data.source import Document, Meter
from mpt.data.words import LIMIT_WORD_CHARACTERS
from mpt.errors import DataError
from tests.data.cases import recipe_for

try:
    prepare(recipe_for(Path(sys.argv[2]), sys.argv[3]))
except DataError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_five_gb_in_one_line_are_an_error_that_names_it_and_not_out_of_memory(
    tmp_path: Path,
) -> None:
    source = tmp_path / "line.jsonl"
    source.write_text('{"text": "short"}\n')
    os.truncate(source, FIVE_GB)  # takes no room: the rest is one line of zeros
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    arguments = [str(Path(__file__).parents[2]), str(tmp_path / "out"), str(source)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_PREPARE, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    message, gib = done.stdout.splitlines()
    assert message.startswith(f"{source}:2: one document of more than")
    assert float(gib) < LARGEST_GIB
