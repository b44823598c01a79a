"""Starts the workers through torch's elastic agent, restarts them, and knows when not to."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from mpt import errors
from mpt.errors import MptError, RestartBudgetError, UsageError
from mpt.launch.attempt import (
    ATTEMPT,
    STOP_SIGNALS,
    SUPERVISOR,
    LastWords,
    attempt_dir,
    last_words,
    next_attempt,
)
from mpt.launch.plan import n_workers, worker_environment
from mpt.log import Journal, say
from mpt.recipe.launch import Launch
from mpt.rundir import LOGS

NEVER_RETRIED = {
    errors.EXIT_USAGE,
    errors.EXIT_DATA,
    errors.EXIT_CHECKPOINT,
    errors.EXIT_DIVERGED,
    errors.EXIT_PREEMPTED,
    errors.EXIT_INTERRUPTED,
}
"""Exit codes of workers that meant to end: the same again would end the same."""

WATCH_EVERY_S = 0.1

SHOW_CURSOR = "\x1b[?25h"


def supervise(run_dir: Path, cfg: Launch) -> int:
    """Run the workers of a run directory until they are done, restarting those that die.

    Returns:
        The exit code for `mpt`: 0 done, 75 and 130 stopped by a signal with a checkpoint,
        143 by SIGTERM without one.

    Raises:
        MptError: what a worker said that ended the run, or that the restart budget is used up.
    """
    n_gpus = torch.cuda.device_count()
    nproc = n_workers(cfg.nproc, n_gpus)
    if 0 < n_gpus < nproc:
        raise UsageError(f"launch.nproc: {nproc} workers, but {n_gpus} GPUs here; one each.")
    first_attempt = next_attempt(run_dir)
    _log_to_file(run_dir)
    n_cpus = len(os.sched_getaffinity(0))
    os.environ.update(worker_environment(nproc, n_cpus, n_gpus, os.environ))
    os.environ[SUPERVISOR] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(signal.name for signal in STOP_SIGNALS)
    agent = _Agent(_spec(run_dir, nproc, cfg.max_restarts), run_dir, first_attempt, cfg)
    try:
        result = agent.run()
    except SignalException as stopped:
        return agent.exit_code_after(stopped.sigval)
    finally:
        if sys.stderr.isatty():
            say(SHOW_CURSOR, end="")  # a rank that was killed could not
    if not result.is_failed():
        return errors.EXIT_DONE
    return agent.verdict(result.failures)


class _Agent(LocalElasticAgent):
    """torch's agent, made to write events and to leave alone what a restart cannot mend."""

    def __init__(self, spec: WorkerSpec, run_dir: Path, first_attempt: int, cfg: Launch) -> None:
        specs = DefaultLogsSpecs(log_dir=str(run_dir / LOGS / "elastic"))
        super().__init__(spec, specs, start_method="spawn", shutdown_timeout=cfg.stop_grace_s)
        self._max_restarts = cfg.max_restarts
        self._run_dir = run_dir
        self.attempt = first_attempt - 1
        """Number of the latest attempt; one more with each start of the workers."""
        self._journal = Journal(run_dir)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.attempt += 1
        attempt_dir(self._run_dir, self.attempt).mkdir(parents=True, exist_ok=True)
        os.environ[ATTEMPT] = str(self.attempt)
        pids: dict[int, Any] = super()._start_workers(worker_group)  # by local rank
        assert self._pcontext is not None, "workers have just been started in it"
        # When a rank dies, torch closes the others with SIGTERM and up to 30 s of patience. They
        # sit in collectives with the dead: they have nothing to save, and cannot hear.
        close = self._pcontext.close
        self._pcontext.close = lambda death_sig=None, timeout=30: close(  # type: ignore[method-assign]
            death_sig or signal.SIGKILL, timeout
        )
        self._journal.event(
            "attempt_started",
            attempt=self.attempt,
            world_size=len(pids),
            pids=[pids[local_rank] for local_rank in sorted(pids)],
        )
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._tell(result.failures)
            if any(f.exitcode in NEVER_RETRIED for f in result.failures.values()):
                self._remaining_restarts = 0
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Pass the signal on and wait; a second Ctrl-C while waiting ends the workers now."""
        try:
            super()._shutdown(*args, **kwargs)
        except SignalException:
            if self._pcontext is not None:
                self._pcontext.close(signal.SIGKILL, 0)
            raise

    def _tell(self, failures: dict[int, ProcessFailure]) -> None:
        """Record what died, and say on the terminal what happens next."""
        if all(f.exitcode in NEVER_RETRIED for f in failures.values()):
            return
        why = "; ".join(self._reason(rank, f) for rank, f in sorted(failures.items()))
        left = self._remaining_restarts
        self._journal.event("fault", attempt=self.attempt, why=why, restarts_left=left)
        outlook = f"restarting ({left} restarts left)" if left else "no restarts left"
        say(f"mpt: {why}; {outlook}.\n")

    def _reason(self, rank: int, failure: ProcessFailure) -> str:
        words = last_words(self._run_dir, self.attempt, rank)
        if words is not None:
            return f"rank {rank} failed: {words.error}: {words.message}"
        if failure.exitcode < 0:
            return f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
        return f"rank {rank} ended with exit code {failure.exitcode}"

    def verdict(self, failures: dict[int, ProcessFailure]) -> int:
        """Turn failures that ended the run into an exit code or an error."""
        for rank, failure in sorted(failures.items()):
            if failure.exitcode in (errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED):
                return int(failure.exitcode)
            words = last_words(self._run_dir, self.attempt, rank)
            if words is not None and failure.exitcode in NEVER_RETRIED:
                raise _as_error(words)
        why = "; ".join(self._reason(rank, f) for rank, f in sorted(failures.items()))
        self._journal.event("gave_up", attempt=self.attempt, why=why)
        logs = attempt_dir(self._run_dir, self.attempt)
        raise RestartBudgetError(
            f"{why}. No restarts are left of launch.max_restarts {self._max_restarts}; see {logs}. "
            f"Once the cause is mended: mpt resume {self._run_dir}"
        )

    def exit_code_after(self, signal_number: signal.Signals) -> int:
        """Return the exit code after a signal, from what the first worker could still say.

        Raises:
            MptError: if it failed instead, as when the save did.
        """
        words = last_words(self._run_dir, self.attempt, 0)
        ends = (errors.EXIT_DONE, errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED)
        if words is not None and words.exit_code in ends:
            return words.exit_code
        if words is not None and words.exit_code in NEVER_RETRIED:
            raise _as_error(words)
        interrupted = signal_number == signal.SIGINT
        return errors.EXIT_INTERRUPTED if interrupted else errors.EXIT_TERMINATED


def _spec(run_dir: Path, nproc: int, max_restarts: int) -> WorkerSpec:
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
    )
    return WorkerSpec(
        role="worker",
        local_world_size=nproc,
        entrypoint=sys.executable,
        args=("-m", "mpt.train.worker", str(run_dir)),
        rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
        max_restarts=max_restarts,
        monitor_interval=WATCH_EVERY_S,
        local_addr="127.0.0.1",
    )


def _as_error(words: LastWords) -> MptError:
    """Make the worker's error this process's own, so that one place prints it."""
    error = MptError(words.message)
    error.exit_code = words.exit_code
    return error


def _log_to_file(run_dir: Path) -> None:
    """Send torch's own log to a file: what it says of a failure, we say in a sentence."""
    path = run_dir / LOGS / "supervisor.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("torch", "torch.distributed"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name == "torch" else []
        logger.propagate = name != "torch"
