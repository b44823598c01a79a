"""One node's part in a run: it does what the coordinator says, and reports what it sees.

It has no opinion on what a fault means. Orders come in through `handle`, reports go out of `turn`;
between the two may lie a network or nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from secrets import token_hex
from shutil import rmtree
from tempfile import mkdtemp
from threading import Thread

from mpt.launch.attempt import attempt_dir
from mpt.launch.fault import ENDS, Fault
from mpt.launch.flight import await_nccl_dumps, nccl_environment, trigger_nccl_dump
from mpt.launch.hang import overdue, rank_states
from mpt.launch.pulse import Beat, Phase, anonymous_file
from mpt.launch.wire import Message, listen
from mpt.launch.workers import Assignment, Workers
from mpt.recipe.launch import Hang

BEAT_S = 0.5
"""How often a node says that it is there."""

DUMP_S = 3.0
"""How long ranks have to write where they are; the coordinator waits a little longer."""

CLEAR_S = 30.0
"""How long killed workers have to be gone."""

HUNG_AGAIN_S = 30.0
"""A node sees only its own ranks: if others explain their silence, it asks again after this."""


class Node:
    """This machine's workers, attempt after attempt."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        *,
        nproc: int,
        environment: Mapping[str, str],
        hang: Hang,
        on_gpus: bool,
    ) -> None:
        """Make the memory that the workers' copies live in; start nothing yet."""
        self.name = name
        self.nproc = nproc
        self.launch = token_hex(8)
        """Tells this process from another that goes by the same name."""
        self._run_dir = run_dir
        self._environment = dict(environment)
        self._hang = hang
        self._store_host = "127.0.0.1"
        self._memory = [anonymous_file(f"mpt-memory-{i}") for i in range(nproc)]
        self._pipes = Path(mkdtemp(prefix="mpt-nccl-")) if on_gpus else None
        self._store: socket.socket | None = None
        self._workers: Workers | None = None
        self._step = 0
        self._announced = False
        self._running_said = False
        self._hung_said = -HUNG_AGAIN_S
        self._last_beat = 0.0
        self._reports: list[Message] = []
        self._stacks: SimpleQueue[Message] = SimpleQueue()

    def reachable_at(self, host: str, interface: str | None) -> None:
        """Take in where other nodes reach this one, and the interface they come in by."""
        self._store_host = host
        if interface is not None:
            # gloo would ask for the address of the host's name, which is often the loopback's.
            self._environment.setdefault(
                "GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", interface)
            )

    def join(self) -> None:
        """Begin anew with a coordinator: it knows nothing of us yet."""
        self._announced = False
        self._reports.clear()

    def handle(self, order: Message) -> None:
        """Do what the coordinator says."""
        match order["kind"]:
            case "start":
                self._start(order)
            case "signal" if self._workers is not None:
                self._workers.send_signal(int(order["number"]))
            case "dump":
                self._dump(int(order["attempt"]))
            case "kill":
                self.kill()

    def turn(self) -> list[Message]:
        """Look at the workers, and return what there is to report."""
        if self._workers is None:
            self._announce()
        else:
            self._watch(self._workers)
        while not self._stacks.empty():
            self._reports.append(self._stacks.get())
        now = time.monotonic()
        if now - self._last_beat >= BEAT_S:
            self._last_beat = now
            self._reports.append({"kind": "beat", "step": self.step})
        reports, self._reports = self._reports, []
        return reports

    def kill(self) -> None:
        """Kill the workers; once the last is gone this node says that it is ready again."""
        if self._workers is not None:
            self._workers.kill()

    @property
    def is_running(self) -> bool:
        """Whether any worker is alive."""
        return self._workers is not None and bool(self._workers.alive)

    @property
    def step(self) -> int:
        """The most steps that a rank of the latest attempt has finished."""
        if self._workers is not None:
            self._step = self._workers.step
        return self._step

    def clear(self) -> None:
        """Kill the workers and wait for their end."""
        self._step = self.step
        self.kill()
        deadline = time.monotonic() + CLEAR_S
        # One that waits for a disk that is gone cannot even be killed: it must not hold us up.
        while self.is_running and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def close(self) -> None:
        """Kill the workers, and give the memory back."""
        self.clear()
        if self._store is not None:
            self._store.close()
        for descriptor in self._memory:
            os.close(descriptor)
        if self._pipes is not None:
            rmtree(self._pipes, ignore_errors=True)

    def _announce(self) -> None:
        """Say that an attempt can start here, and where its store would listen."""
        if self._announced:
            return
        if self._store is not None:
            self._store.close()
        # A new socket for each attempt, made before anybody is told its port: nobody can take it,
        # and no rank can meet what an earlier attempt left in a store.
        self._store = listen(self._store_host, 0)
        port = self._store.getsockname()[1]
        self._reports.append({"kind": "ready", "nproc": self.nproc, "port": port})
        self._announced = True

    def _start(self, order: Message) -> None:
        assignment = Assignment(**order["assignment"])
        if not order["keep_memory"]:
            for descriptor in self._memory:
                os.ftruncate(descriptor, 0)
        assert self._store is not None, "a node announces its port before it is given work"
        self._announced = False
        self._running_said, self._hung_said = False, -HUNG_AGAIN_S
        environment = dict(self._environment)
        if self._pipes is not None:
            logs = attempt_dir(self._run_dir, assignment.attempt)
            environment |= nccl_environment(logs, self._pipes)
        try:
            self._workers = Workers(
                self._run_dir,
                self.name,
                assignment,
                environment,
                self._memory,
                self._store.fileno(),
            )
        except OSError as error:
            why = f"node {self.name} cannot start workers: {error}"
            fault = Fault("failed", self.name, why, error=type(error).__name__, time=time.time())
            self._report_faults([fault])
            return
        self._reports.append({"kind": "started", "pids": list(self._workers.pids.values())})

    def _watch(self, workers: Workers) -> None:
        self._report_faults(workers.new_faults())
        beats = workers.beats()
        if not self._running_said and any(
            beat.phase not in (Phase.START, Phase.FIRST_STEP) for beat in beats.values()
        ):
            self._running_said = True
            self._reports.append({"kind": "running", "step": workers.step})
        alive = workers.alive
        if not alive:
            self._finish(workers)
            return
        now = time.monotonic()
        hung = overdue({rank: beats[rank] for rank in alive}, now, self._hang)
        if hung and now - self._hung_said > HUNG_AGAIN_S:
            self._hung_said = now
            self._reports.append({"kind": "hung"})

    def _finish(self, workers: Workers) -> None:
        """All ranks of the attempt have ended, one way or another."""
        self._report_faults(workers.new_faults())  # of those that ended since the last look
        codes = workers.exit_codes()
        workers.kill()  # what a rank has started and left behind
        workers.close()
        self._workers = None
        if all(code in ENDS for code in codes.values()):
            self._reports.append({"kind": "ended", "codes": sorted(set(codes.values()))})

    def _dump(self, attempt: int) -> None:
        """Have all ranks write where they are, and report what that says."""
        pids: dict[int, int] = {}
        beats: dict[int, Beat] = {}
        if (workers := self._workers) is not None:
            pids = {rank: workers.pids[rank] for rank in workers.alive}
            beats = workers.beats()
        logs = attempt_dir(self._run_dir, attempt)
        # Not here: it takes seconds, and a node that says nothing for seconds counts as lost.
        arguments = (attempt, logs, pids, beats)
        Thread(target=self._await_dumps, args=arguments, daemon=True).start()

    def _await_dumps(
        self, attempt: int, logs: Path, pids: dict[int, int], beats: dict[int, Beat]
    ) -> None:
        deadline = time.monotonic() + DUMP_S
        asked = trigger_nccl_dump(self._pipes, pids) if self._pipes is not None else []
        found = rank_states(self.name, logs, pids, beats)
        await_nccl_dumps(logs, asked, deadline - time.monotonic())
        states = [asdict(state) for state in found]
        self._stacks.put({"kind": "stacks", "attempt": attempt, "ranks": states})

    def _report_faults(self, faults: list[Fault]) -> None:
        if faults:
            self._reports.append({"kind": "faults", "faults": [asdict(fault) for fault in faults]})
