"""A rank's main: everything it knows comes from the run directory and the launcher's environment.

python -m mpt.train.worker RUN_DIR
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

from mpt import errors
from mpt.errors import MptError
from mpt.launch.attempt import SUPERVISOR, LastWords, attempt_dir, leave_last_words, this_attempt
from mpt.launch.pulse import Phase, Pulse
from mpt.launch.stacks import answer_stack_signal, stack_file
from mpt.log import Unfailing
from mpt.train.stop import StopSignal

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Train, and end with the exit code that tells the supervisor why."""
    run_dir = Path(sys.argv[1])
    _die_with_supervisor()
    stop = StopSignal.install()
    terminal = _log_to_own_file(run_dir)
    answer_stack_signal(
        stack_file(attempt_dir(run_dir, this_attempt()), int(os.environ.get("RANK", "0")))
    )
    pulse = Pulse.inherited()
    pulse.beat(Phase.START, 0)  # says also which thread is the main one
    code = errors.EXIT_INTERNAL
    try:
        code = _run(run_dir, terminal, stop, pulse)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Not sys.exit: after a failure, torch's exit handlers can wait for ever on dead ranks.
        os._exit(code)


def _run(run_dir: Path, terminal: TextIO, stop: StopSignal, pulse: Pulse) -> int:
    def leave(code: int, error: str, message: str) -> int:
        rank = int(os.environ.get("RANK", "0"))
        words = LastWords(rank, code, error, message, pulse.read().step, time.time())
        leave_last_words(run_dir, words)
        return code

    try:
        signal_number = _train(run_dir, terminal, stop, pulse)
    except MptError as error:
        return leave(error.exit_code, type(error).__name__, str(error))
    except BaseException as error:  # noqa: BLE001 - the boundary of the process
        traceback.print_exc()
        why = str(error) or "no message"
        return leave(errors.EXIT_INTERNAL, type(error).__name__, why)
    if signal_number is None:
        return leave(errors.EXIT_DONE, "", "done")
    interrupted = signal_number == signal.SIGINT
    code = errors.EXIT_INTERRUPTED if interrupted else errors.EXIT_PREEMPTED
    return leave(code, "", f"saved and stopped by {signal.Signals(signal_number).name}")


def _train(run_dir: Path, terminal: TextIO, stop: StopSignal, pulse: Pulse) -> int | None:
    # torch enters here: it takes seconds, in which signals and output are already looked after.
    import torch

    from mpt import recipe
    from mpt.dist import process_group
    from mpt.rundir import RECIPE
    from mpt.train.run import train

    # Far keys under ALiBi and unlikely tokens end as denormals, with which a CPU is many times
    # slower; as zeros they change nothing. Threads started from here on inherit the setting.
    torch.set_flush_denormal(True)
    cfg = recipe.load(run_dir / RECIPE)
    with process_group() as ranks:
        return train(cfg, run_dir, ranks, terminal, stop, pulse)


def _die_with_supervisor() -> None:
    """Have the kernel kill this rank when its supervisor dies: an orphan would train on unseen."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    supervisor = os.environ.get(SUPERVISOR, str(os.getppid()))
    if str(os.getppid()) != supervisor:  # it died before the request was in place
        print(f"mpt: the supervisor {supervisor} is gone.", file=sys.stderr)
        os._exit(errors.EXIT_INTERNAL)


def _log_to_own_file(run_dir: Path) -> TextIO:
    """Send all output, that of C++ included, to this rank's log; return the terminal's stream."""
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    path = attempt_dir(run_dir, this_attempt()) / f"rank-{os.environ.get('RANK', '0')}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode=0o644)
    except OSError as error:
        log = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):
            print(f"mpt: {path}: cannot be written: {error.strerror}.", file=terminal)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # What a library prints on a full disk must not end the run.
    sys.stdout = cast(TextIO, Unfailing(sys.stdout))
    sys.stderr = cast(TextIO, Unfailing(sys.stderr))
    return terminal


if __name__ == "__main__":
    main()
