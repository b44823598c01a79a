"""Laws of a prepare that is killed: nothing looks complete, and the next call makes up for it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mpt.data.dataset import open_dataset, verify
from mpt.data.plan import Progress
from mpt.data.prepare import is_prepared, prepare
from mpt.errors import DataError
from tests.data.cases import (
    files_of,
    recipe_for,
    some_texts,
    with_model,
    write_texts,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts", some_texts(60))


PAUSED_PREPARE = """
import signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import mpt.data.batches
from mpt.data.prepare import prepare
from tests.data.cases import recipe_for

recipe, pause_at = recipe_for(Path(sys.argv[2]), sys.argv[3]), int(sys.argv[4])
mpt.data.batches.BATCH_CHARACTERS = 700
calls = 0

def pause():
    print("paused", flush=True)
    signal.pause()

def counted(original):
    def move(self, target):
        global calls
        calls += 1
        if calls == pause_at:
            pause()
        return original(self, target)
    return move

Path.replace, Path.rename = counted(Path.replace), counted(Path.rename)
prepare(recipe, progress=lambda p: pause() if p.tokens > 2500 and not pause_at else None)
print("done", flush=True)
"""


def start_and_pause(out: Path, corpus: Path, pause_at: int) -> subprocess.Popen[bytes]:
    """A process that prepares and stops before its n-th rename, or at 0 amid the shards."""
    arguments = [str(Path(__file__).parents[2]), str(out), str(corpus), str(pause_at)]
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED_PREPARE, *arguments], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"paused\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


# Renames: tokenizer; the journals of train and eval; dataset.json and index.json of train, then of
# eval; eval, train in place.
@pytest.mark.parametrize("pause_at", range(10))
def test_a_killed_prepare_leaves_nothing_that_looks_complete_and_is_made_up_for(
    tmp_path: Path, corpus: Path, pause_at: int
) -> None:
    prepare(recipe_for(tmp_path / "clean", corpus))
    recipe = recipe_for(tmp_path / "out", corpus)
    kill(start_and_pause(tmp_path / "out", corpus, pause_at))
    assert not is_prepared(recipe)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "train" not in left
    assert ("eval" in left) == (pause_at == 9)
    if pause_at == 0:
        assert (tmp_path / "out" / "train.partial" / "shard.00000.mds").exists()
        with pytest.raises(DataError, match=r"no index\.json"):
            open_dataset(tmp_path / "out" / "train.partial")
    done = prepare(recipe)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")
    assert verify(done.streams["only"]) == []


def test_a_dataset_that_only_lacks_its_name_is_not_made_again(tmp_path: Path, corpus: Path) -> None:
    kill(start_and_pause(tmp_path / "out", corpus, 8))
    partial = tmp_path / "out" / "eval.partial"
    assert not (partial / "journal.jsonl").exists()
    made = {path.name: path.stat().st_ino for path in partial.iterdir()}
    prepare(recipe_for(tmp_path / "out", corpus))
    eval_set = tmp_path / "out" / "eval"
    assert made == {path.name: path.stat().st_ino for path in eval_set.iterdir()}


@pytest.mark.parametrize(("eval_fraction", "length"), [(0.4, 16), (0.2, 8)])
def test_a_dataset_that_only_lacks_its_name_is_made_again_for_other_settings(
    tmp_path: Path, corpus: Path, eval_fraction: float, length: int
) -> None:
    kill(start_and_pause(tmp_path / "out", corpus, 8))
    (tmp_path / "clean").mkdir()
    shutil.copy(tmp_path / "out" / "tokenizer.model", tmp_path / "clean")
    for name in ("out", "clean"):
        recipe = recipe_for(tmp_path / name, corpus, eval_fraction=eval_fraction)
        prepare(with_model(recipe, max_seq_len=length))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_a_second_prepare_waits_for_the_first_and_takes_over_when_it_dies(
    tmp_path: Path, corpus: Path
) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    first = start_and_pause(tmp_path / "out", corpus, 0)
    waiting = threading.Event()

    def watch(seen: Progress) -> None:
        if seen.stage == "waiting":
            waiting.set()

    second = threading.Thread(target=prepare, args=(recipe,), kwargs={"progress": watch})
    second.start()
    assert waiting.wait(timeout=30)
    assert second.is_alive()
    kill(first)
    second.join(timeout=30)
    assert is_prepared(recipe)
    assert not list((tmp_path / "out").glob("*.partial"))
