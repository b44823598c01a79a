"""The nodes of a run as processes on this machine: `mpt train`, once each, as a cluster would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpt.errors import MptError
from mpt.launch.lease import read_claim

PATIENCE_S = 900.0
"""A run that takes longer to end, or to take a step, is not going to."""


class Nodes:
    """Supervisors that train one run together; a dead one can be started again."""

    def __init__(
        self,
        command: Sequence[str],
        run_dir: Path,
        logs: Path,
        *,
        n: int,
        environment: Mapping[str, str],
        gpus: Sequence[str],
    ) -> None:
        """Prepare; start nothing yet.

        Args:
            command: arguments of `mpt`, the same for every node.
            logs: directory for what the nodes say.
            n: nodes.
            environment: of every node, beside this process's own.
            gpus: identifiers of GPUs to share out among the nodes; empty on a CPU.
        """
        self._run_dir, self._logs = run_dir, logs
        self._command = list(command)
        if n > 1:
            self._command += ["--nnodes", str(n), "--rdzv", "127.0.0.1:0"]
        self._environments = [
            {**os.environ, **environment, **_gpus_of(i, n, gpus)} for i in range(n)
        ]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * n

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process is not None:
                process.kill()
                process.wait()

    def start(self) -> None:
        """Start every node that does not run."""
        for i, process in enumerate(self._processes):
            if process is not None and process.poll() is None:
                continue
            with (self._logs / f"{self.name(i)}.log").open("ab") as log:
                self._processes[i] = subprocess.Popen(
                    [sys.executable, "-m", "mpt.cli.main", *self._command, "--node", self.name(i)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environments[i],
                    start_new_session=True,
                )

    def name(self, i: int) -> str:
        """Return the name of a node."""
        return f"node-{i}"

    def leader(self) -> int | None:
        """Return which node leads; None while nobody does."""
        claim = read_claim(self._run_dir)
        names = [self.name(i) for i in range(len(self._processes))]
        return names.index(claim.node) if claim is not None and claim.node in names else None

    def running(self) -> list[int]:
        """Return the nodes whose supervisor is alive."""
        return [i for i, p in enumerate(self._processes) if p is not None and p.poll() is None]

    def signal(self, i: int, number: signal.Signals) -> None:
        """Send a signal to a node's supervisor."""
        process = self._processes[i]
        if process is not None:
            process.send_signal(number)

    def wait(self) -> list[int]:
        """Wait until every node has ended, and return the exit codes.

        Raises:
            MptError: if one does not end.
        """
        deadline = time.monotonic() + PATIENCE_S
        try:
            return [
                process.wait(max(0.0, deadline - time.monotonic()))
                for process in self._processes
                if process is not None
            ]
        except subprocess.TimeoutExpired:
            raise MptError(f"{self._run_dir}: did not end within {PATIENCE_S:g} s.") from None

    def exit_codes(self) -> list[int | None]:
        """Return the exit code of each node, None for one that runs."""
        return [None if p is None else p.poll() for p in self._processes]


def _gpus_of(i: int, n: int, gpus: Sequence[str]) -> dict[str, str]:
    if not gpus:
        return {}
    share = gpus[len(gpus) * i // n : len(gpus) * (i + 1) // n]
    return {"CUDA_VISIBLE_DEVICES": ",".join(share)}
