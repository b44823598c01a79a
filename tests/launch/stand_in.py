"""Real processes in the place of ranks: they do what a test has written down, and no training."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt.launch.stacks import GONE, ZOMBIE, process_state

PYTHON = sys.executable

PATIENCE_S = 60.0

HEAD = """\
import json, os, signal, sys, time
from pathlib import Path

from mpt.launch.attempt import STOP_SIGNALS, LastWords, leave_last_words
from mpt.launch.pulse import Phase, Pulse

signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
assert sys.argv[1:3] == ["-m", "mpt.train.worker"], sys.argv
run_dir, rank = Path(sys.argv[3]), int(os.environ["RANK"])


def say(what):
    path = run_dir / f"rank-{rank}.part"
    path.write_text(json.dumps(what))
    path.rename(run_dir / f"rank-{rank}.said")


def fail(error, code, step=0):
    leave_last_words(run_dir, LastWords(rank, code, error, "the reason", step, time.time()))
    os._exit(code)


def last():
    signal.pause()


"""


def ranks_do(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every rank that is started from here on run `body`.

    It can use `say` to be heard by `said`, `fail` to end with last words, `last` to stay.
    """
    program, interpreter = tmp_path / "rank.py", tmp_path / "python"
    program.write_text(HEAD + textwrap.dedent(body))
    # Started in the interpreter's place: what the launcher runs is `python -m mpt.train.worker`.
    interpreter.write_text(f'#!/bin/sh\nexec "{PYTHON}" "{program}" "$@"\n')
    interpreter.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(interpreter))


def await_that(claim: Callable[[], Any]) -> Any:
    """Return what the claim returns once that is truthy."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := claim()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)
    return found


def said(run_dir: Path, rank: int) -> Path:
    """Return the file that a rank has said something in, once it has."""
    path = run_dir / f"rank-{rank}.said"
    await_that(path.exists)
    return path


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit code yet."""
    return process_state(pid) in (GONE, ZOMBIE)
