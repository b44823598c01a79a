"""A `prepare` in a process of its own that stops where a test wants it, and its workers."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mpt.recipe.curate import Curate

STOPPING_PREPARE = """
import json, os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import mpt.data.batches
from mpt.data.prepare import prepare
from mpt.recipe.plain import curate_from
from tests.data.cases import recipe_for

at_sync, workers = int(sys.argv[4]), int(sys.argv[5])
rules = json.loads(sys.argv[6])
curate = {"curate": curate_from(rules)} if rules else {}
mpt.data.batches.BATCH_CHARACTERS = 700
synced, fsync = 0, os.fsync

def stop():
    print("stopped", flush=True)
    signal.pause()

def counted(descriptor):
    global synced
    synced += 1
    if synced == at_sync:
        stop()
    fsync(descriptor)

def watch(seen):
    if seen.tokens > 2500 and not at_sync:
        stop()

# Who starts tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.fsync = counted
prepare(recipe_for(Path(sys.argv[2]), sys.argv[3], **curate), progress=watch, workers=workers)
print("done", flush=True)
"""


@contextmanager
def stopped_prepare(
    out: Path, source: Path, *, workers: int, at_sync: int = 0, curate: Curate | None = None
) -> Iterator[subprocess.Popen[str] | None]:
    """Give a process that prepares and stopped before its n-th fsync, or at 0 amid the shards.

    None if it was done before. It is killed at the end of the block, if it is still there.
    """
    rules = json.dumps(asdict(curate) if curate else None)
    arguments = [Path(__file__).parents[2], out, source, at_sync, workers, rules]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING_PREPARE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        word = process.stdout.readline()
        assert word in ("stopped\n", "done\n"), process.communicate()[1]
        yield process if word == "stopped\n" else None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def workers_of(parent: int) -> list[int]:
    """Return the processes that a process has started to tokenize; it may have others."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it ended
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and b"mpt.data.worker" in command:
            found.append(int(folder.name))
    return found


class Watched:
    """Processes that are not ours, held so that their end can be awaited."""

    def __init__(self, pids: list[int]) -> None:
        self._handles = [os.pidfd_open(pid) for pid in pids]

    def all_end(self, timeout_s: float = 30) -> bool:
        """Wait for the end of every one; False if one outlives the time."""
        ended = [select.select([handle], [], [], timeout_s)[0] for handle in self._handles]
        for handle in self._handles:
            os.close(handle)
        return all(ended)
