"""The worker processes of one attempt on this machine: started, watched, signalled, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpt.launch.attempt import (
    ATTEMPT,
    MEMORY_FD,
    STOP_SIGNALS,
    STORE_FD,
    SUPERVISOR,
    attempt_dir,
    last_words,
)
from mpt.launch.fault import ENDS, Fault
from mpt.launch.pulse import PULSE_FD, Beat, Pulse


@dataclass(frozen=True)
class Assignment:
    """This node's part of an attempt."""

    attempt: int
    node_rank: int
    first_rank: int
    """Ranks of this node are first_rank, first_rank + 1, ..."""
    nproc: int
    world_size: int
    store_host: str
    store_port: int

    def environment(self, local_rank: int) -> dict[str, str]:
        """Return what a worker is told: torchrun's own variables, and the attempt."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.store_host,
            "MASTER_PORT": str(self.store_port),
            ATTEMPT: str(self.attempt),
            SUPERVISOR: str(os.getpid()),
        }


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    pulse: Pulse
    reported: bool = False
    killed: bool = False
    """By us: its death is no news."""


class Workers:
    """The ranks of one attempt on this node. Start them from the main thread, which they outlive
    by no moment: the kernel ties their death to the thread that made them."""

    def __init__(
        self,
        run_dir: Path,
        node: str,
        assignment: Assignment,
        environment: dict[str, str],
        memory: list[int],
        store: int | None,
    ) -> None:
        """Start them.

        Args:
            environment: of every worker, beside what the assignment adds.
            memory: a descriptor for each local rank.
            store: descriptor of the listening socket, if rank 0 is here.

        Raises:
            OSError: a process could not be started; none is left.
        """
        self.assignment = assignment
        self._run_dir = run_dir
        self._node = node
        self._workers: list[_Worker] = []
        attempt_dir(run_dir, assignment.attempt).mkdir(parents=True, exist_ok=True)
        try:
            for local_rank in range(assignment.nproc):
                self._start(local_rank, environment, memory[local_rank], store)
        except OSError:
            self.kill()
            for worker in self._workers:
                worker.process.wait()
            self.close()
            raise

    def _start(
        self, local_rank: int, environment: dict[str, str], memory: int, store: int | None
    ) -> None:
        pulse = Pulse.create()
        own = self.assignment.environment(local_rank)
        own |= {PULSE_FD: str(pulse.descriptor), MEMORY_FD: str(memory)}
        descriptors = [pulse.descriptor, memory]
        if store is not None and self.assignment.first_rank + local_rank == 0:
            own[STORE_FD] = str(store)
            descriptors.append(store)
        # Until it can answer them, stop signals wait: they would end the rank where it stands.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "mpt.train.worker", str(self._run_dir)],
                env={**os.environ, **environment, **own},
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                # A session of its own: Ctrl-C on the terminal is for the supervisor to pass on.
                start_new_session=True,
            )
        except OSError:
            pulse.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        self._workers.append(_Worker(int(own["RANK"]), process, pulse))

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank."""
        return {worker.rank: worker.process.pid for worker in self._workers}

    @property
    def alive(self) -> list[int]:
        """Ranks whose process has not ended."""
        return [worker.rank for worker in self._workers if worker.process.poll() is None]

    @property
    def step(self) -> int:
        """The most steps that a rank here has finished."""
        return max(worker.pulse.read().step for worker in self._workers)

    def beats(self) -> dict[int, Beat]:
        """Return the latest beat of each rank."""
        return {worker.rank: worker.pulse.read() for worker in self._workers}

    def exit_codes(self) -> dict[int, int]:
        """Return how each rank ended; meaningful once none is alive."""
        return {w.rank: w.process.returncode for w in self._workers if w.process.poll() is not None}

    def new_faults(self) -> list[Fault]:
        """Return the deaths since the last call that nobody asked for."""
        found = []
        for worker in self._workers:
            code = worker.process.poll()
            if code is None or worker.reported:
                continue
            worker.reported = True
            if code not in ENDS and not worker.killed:
                found.append(self._fault(worker, code))
        return found

    def _fault(self, worker: _Worker, code: int) -> Fault:
        words = last_words(self._run_dir, self.assignment.attempt, worker.rank)
        beat = worker.pulse.read()
        who, error, ended = f"rank {worker.rank}", "", time.time()
        if code < 0:
            error = _signal_name(-code)
            why = f"{who} was killed by {error}"
        elif words is None:
            why = f"{who} ended with exit code {code}"
        else:
            error, ended = words.error, words.time
            why = f"{who} failed: {words.error}: {words.message}"
        return Fault(
            "killed" if code < 0 else "failed",
            self._node,
            why,
            worker.rank,
            beat.step,
            round(time.monotonic() - beat.at, 3),
            code,
            error,
            ended,
        )

    def send_signal(self, number: int) -> None:
        """Pass a signal on to every rank that is still there."""
        for worker in self._workers:
            if worker.process.poll() is None:
                with suppress(ProcessLookupError):
                    worker.process.send_signal(number)

    def kill(self) -> None:
        """Kill what is left, and what it has started; does not wait."""
        for worker in self._workers:
            worker.killed = worker.killed or worker.process.poll() is None
            # The group is there as long as one of its processes is, such as a compiler's.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the pulses, once no rank is alive."""
        for worker in self._workers:
            worker.pulse.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
