"""Starts the ranks of a measurement as training would, and collects what they found. No torch."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mpt import recipe as recipes
from mpt.errors import MptError, UsageError
from mpt.launch.plan import count_gpus, n_workers, worker_environment
from mpt.recipe import Recipe

_LAST_LINES = 20
"""Of a rank that died: what is shown of its log."""


def bench(cfg: Recipe, *, steps: int, warmup: int, real: bool) -> dict[str, Any]:
    """Measure the training step of a recipe on this machine.

    Raises:
        UsageError: if a rank finds that the recipe cannot be trained here.
        MptError: if a rank dies; its last lines are in the message.
    """
    if warmup < 1 or steps < 1:
        raise UsageError(f"{steps} steps after {warmup} of warm-up: at least 1 of each.")
    n_gpus = count_gpus()
    nproc = n_workers(cfg.launch.nproc, n_gpus)
    if 0 < n_gpus < nproc:
        raise UsageError(f"launch.nproc: {nproc} workers, but {n_gpus} GPUs here; one each.")
    with tempfile.TemporaryDirectory(prefix="mpt-bench-") as scratch:
        recipe_file, result = Path(scratch) / "recipe.yaml", Path(scratch) / "result.json"
        recipes.freeze(cfg, recipe_file)
        command = [sys.executable, "-m", "mpt.bench.worker", str(recipe_file), str(result)]
        command += [str(steps), str(warmup), "real" if real else "random"]
        _run_ranks(command, nproc, n_gpus, Path(scratch))
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def _run_ranks(command: list[str], nproc: int, n_gpus: int, scratch: Path) -> None:
    """Start the ranks and wait for all; the first that fails ends the others."""
    n_cpus = len(os.sched_getaffinity(0))
    shared = worker_environment(nproc, n_cpus, n_gpus, os.environ)
    port = _free_port()
    logs = [scratch / f"rank-{rank}.log" for rank in range(nproc)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            environment = {
                **os.environ,
                **shared,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output)
                )
        _await_all(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _await_all(processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    with ExitStack() as stack:
        waiting = {}
        for rank, process in enumerate(processes):
            descriptor = os.pidfd_open(process.pid)
            stack.callback(os.close, descriptor)
            waiting[descriptor] = rank
        while waiting:
            for descriptor in select.select(list(waiting), [], [])[0]:
                rank = waiting.pop(descriptor)
                if code := processes[rank].wait():
                    raise _died(rank, code, logs[rank])


def _died(rank: int, code: int, log: Path) -> MptError:
    """Return the error of a rank: its own words, with its own exit code, if it had any."""
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:])
    if last.startswith("mpt: "):
        error = MptError(last.removeprefix("mpt: "))
        error.exit_code = code
        return error
    return MptError(f"rank {rank} of the measurement ended with {code}:\n{last}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
