"""Runs a function on real process groups: forked processes, gloo, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mpt.dist import Ranks

TIMEOUT_S = 120

_context = multiprocessing.get_context("forkserver")
# Imported once, in the server; each rank is forked from there and starts at once.
_context.set_forkserver_preload(["tests.preload"])


def on_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `work(ranks, *args)` returns on each rank of a new process group.

    Raises:
        AssertionError: with the traceback of a rank that failed, or if ranks hang.
    """
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(world_size):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main, args=(there, directory, rank, world_size, work, args)
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for i, pipe in enumerate(pipes) if i not in results]
        ready = wait(waiting, timeout=TIMEOUT_S)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - results.keys())} hang"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failure, result = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert not failure, f"rank {rank}:\n{failure}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    directory: str,
    rank: int,
    world_size: int,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from mpt.dist import ranks

    torch.set_num_threads(1)
    store = Path(directory, "store")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        me: Ranks = ranks(torch.device("cpu"))
        result = work(me, *args)
        dist.barrier()
        pipe.send_bytes(pickle.dumps(("", result)))
    except BaseException:  # noqa: BLE001 - carried over to the test
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
    pipe.close()
    os._exit(0)
