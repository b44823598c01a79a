"""Logs in trouble: told once, and what is written after it is whole."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mpt.display import Display
from mpt.log import Journal, Unfailing, read_lines, say
from mpt.rundir import EVENTS
from tests.disks import fill_up, make_read_only, small_disk


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_lines(run_dir / EVENTS)]


def journal_in(run_dir: Path) -> tuple[Journal, list[str]]:
    said: list[str] = []
    return Journal(run_dir, said.append), said


def test_a_line_that_a_full_disk_cuts_off_does_not_take_the_next_one_with_it(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path, kib=64):
        filler = fill_up(tmp_path, free_pages=1)
        journal, said = journal_in(tmp_path)
        step = 0
        while not said:
            step += 1
            journal.event("x", step=step, why="a line of some length" * 5)
        n_written = len(steps(tmp_path))
        cut = (tmp_path / EVENTS).read_bytes()
        assert not cut.endswith(b"\n"), "the disk was full in the middle of a line"
        assert n_written == step - 1 > 1, "told of the first line that is lost"
        journal.event("x", step=99)
        assert [("No space" in why, EVENTS in why) for why in said] == [(True, True)]
        filler.unlink()
        # Another process, as the supervisor is one, does not know of the cut.
        other, unsaid = journal_in(tmp_path)
        for writer, step in ((other, 100), (journal, 101)):
            writer.event("x", step=step)
        assert steps(tmp_path) == [*range(1, n_written + 1), 100, 101]
        assert (len(said), unsaid) == (1, [])


def test_a_line_that_a_kill_cut_off_is_lost_alone(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"event": "x", "step": 1}\n{"event": "x", "st')
    journal, said = journal_in(tmp_path)
    journal.event("x", step=3)
    assert (steps(tmp_path), said) == ([1, 3], [])


@pytest.mark.parametrize("harm", [shutil.rmtree, make_read_only])
def test_a_directory_that_cannot_be_written_to_is_told_of_once(
    tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        place = disk / "run" if harm is shutil.rmtree else disk
        place.mkdir(exist_ok=True)
        journal, said = journal_in(place)
        harm(place)
        for step in range(3):
            journal.event("x", step=step)
            journal.metrics(step=step)
    assert len(said) == 1
    assert str(place) in said[0]


@pytest.mark.parametrize("closed", [False, True])
def test_printing_on_a_full_disk_or_a_closed_stream_raises_nothing(closed: bool) -> None:
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closing it fails too
    if closed:
        full.close()
    stream = Unfailing(full)
    print("a line", file=stream, flush=True)
    print("no line", end="", file=stream, flush=True)
    stream.writelines(["a\n", "b\n"])
    assert stream.closed is closed, "it is the stream in all other respects"
    with suppress(OSError):
        full.close()


def test_nothing_is_said_where_nobody_listens(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it after `2>&-`
    say("hello")
    assert capfd.readouterr().out == "", "stdout is for results"


PRINTING = """
import sys
from pathlib import Path
from mpt.train.worker import _log_to_own_file
terminal = _log_to_own_file(Path(sys.argv[1]))
print("a library says something", flush=True)
print("and warns", file=sys.stderr)
print("it goes on", file=terminal)
"""


@pytest.mark.parametrize("harm", [fill_up, make_read_only])
def test_a_rank_whose_log_cannot_be_written_goes_on(
    tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    with small_disk(tmp_path / "logs", kib=64) as disk:
        harm(disk)
        command = [sys.executable, "-u", "-c", PRINTING, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("it goes on\n")
    assert "says something" not in done.stderr
    assert ("cannot be written" in done.stderr) == (harm is make_read_only)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_the_terminal_leaves_other_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    before = sys.stdout, sys.stderr
    with Display(Terminal(), 10, 1) as display:
        display.note("a note")
        assert (sys.stdout, sys.stderr) == before
