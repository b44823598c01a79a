"""Laws of data that go bad under a real run: exit code 3, with the shard's name, and no restart."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mpt.errors import EXIT_DATA
from tests.data.faults import serving
from tests.e2e.conftest import Small, await_that, lines

SHARD = "shard.00000.mds"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("corrupt!", "corrupt shard: of shard.00000.mds, its sha256 is"),
        ("truncate!", "not fetched within"),
    ],
)
def test_a_remote_shard_that_cannot_be_had_ends_the_run(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(small.root / "train") as server:
        server.faults[SHARD] = [fault]
        overrides = [
            f"data.streams.stdlib.path={server.url}",
            f"data.cache.dir={tmp_path}/cache",
            "data.cache.deadline_s=2",
            "data.eval=null",
            "prepare=null",
        ]
        run_dir = tmp_path / "run"
        done = small.mpt("train", small.recipe, *overrides, "--run-dir", run_dir, code=EXIT_DATA)
    assert f"{server.url}/{SHARD}: {words}" in done.stderr
    attempts = [e for e in lines(run_dir / "events.jsonl") if e["event"] == "attempt_started"]
    assert len(attempts) == 1


def test_a_shard_that_is_cut_short_under_a_run_ends_it_and_crashes_nothing(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for path in (small.root / "train").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    run_dir = tmp_path / "run"
    arguments = [f"data.streams.stdlib.path={folder}", "train.steps=1000000", "prepare=null"]
    run = small.start("train", small.recipe, *arguments, "--run-dir", run_dir)
    children.append(run)
    await_that(lambda: lines(run_dir / "metrics.jsonl"), run)
    os.truncate(folder / SHARD, 1000)
    _, errors = run.communicate()
    assert run.returncode == EXIT_DATA, errors
    assert f"{folder}/{SHARD}: corrupt shard: it has become shorter" in errors
    assert "Traceback" not in errors
