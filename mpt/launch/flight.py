"""NCCL's flight recorder: which collectives each GPU has begun and not finished, on request.

torch keeps it in every rank. It is asked through a named pipe and writes a file beside the rank's
log, for torch's own analyser; it is a pickle, so nothing here ever opens one.

Source: torch/csrc/distributed/c10d/{ProcessGroupNCCL.hpp, ProcessGroupNCCL.cpp, FlightRecorder.hpp}
of torch 2.13; older names of the same variables are set too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

ENTRIES = 2000
"""Collectives that are remembered; torch's own default where it has one."""

STEM = "nccl-rank-"
"""torch adds the rank, and .pipe to the name of a pipe."""


def nccl_environment(attempt_dir: Path, pipes: Path) -> dict[str, str]:
    """Return the variables that have workers with GPUs record, and listen for a request.

    Args:
        attempt_dir: the logs of the attempt, where the records go.
        pipes: a directory on this machine that nobody else can write to. Not in the run
            directory: a file system without pipes would end the rank, in a thread of torch's.
    """
    records = str(attempt_dir / STEM)
    return {
        "TORCH_FR_BUFFER_SIZE": str(ENTRIES),
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(ENTRIES),
        "TORCH_FR_DUMP_TEMP_FILE": records,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": records,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(pipes / STEM),
        # Without it the pipe is looked at once in eight minutes; with it, once a second.
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def trigger_nccl_dump(pipes: Path, ranks: Iterable[int]) -> list[int]:
    """Ask ranks for their record, and return those that listen; waits for nobody."""
    asked = []
    for rank in ranks:
        with suppress(OSError):  # no pipe: not begun; nobody at its other end: dead
            descriptor = os.open(pipes / f"{STEM}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(descriptor, b"1")
            finally:
                os.close(descriptor)
            asked.append(rank)
    return asked


def await_nccl_dumps(
    attempt_dir: Path, ranks: Iterable[int], patience_s: float = 3.0
) -> dict[int, Path]:
    """Return the records of these ranks once all are written, or of those that are, in time.

    A rank whose interpreter's lock is held for ever writes none: torch needs it to name lines.
    """
    files = {rank: attempt_dir / f"{STEM}{rank}" for rank in ranks}
    deadline = time.monotonic() + patience_s
    before: dict[int, int] = {}
    while time.monotonic() < deadline:
        sizes = {rank: _size(path) for rank, path in files.items()}
        if all(sizes.values()) and sizes == before:
            break
        before = sizes
        time.sleep(0.1)
    return {rank: path for rank, path in files.items() if _size(path)}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
