"""Who leads a run: one supervisor at a time, by a claim in the run directory that it renews.

The claim is a file that all nodes see. Its holder touches it every second. A claim whose process
is gone (seen on the same node), or that stays untouched for `LEASE_S` (seen from another node, by
that node's own clock), is stale and may be taken. Reading and writing it happens under `flock`, so
that of two takers one wins. A holder that was asleep finds another's claim and steps down; what its
workers still do cannot be committed, because the next attempt has a higher number.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO

from mpt.errors import UsageError
from mpt.rundir import LOCK

RENEW_S = 1.0
LEASE_S = 5.0
"""A claim that another node has not seen renewed for this long is stale."""

NOBODY = 0
"""Process of a claim that was let go of."""

_LOOK_S = 0.1


@dataclass(frozen=True)
class Claim:
    """What the lock file says of the launch that has the run."""

    pid: int
    host: str
    node: str
    """Name of the node; the host's, unless the user gave another."""
    started: int
    """Start time of the process in clock ticks since boot: tells a pid from its next user."""
    nonce: str
    """Random; also what a node must show to join."""
    address: str | None = None
    """host:port where other nodes join; None while it prepares, and on a single node."""
    ready: bool = False
    """Data and recipe are in place, so that another node could go on from here."""

    @property
    def holder(self) -> str:
        """pid@host."""
        return f"{self.pid}@{self.host}"


class Lease:
    """The claim of this process, renewed by a thread of its own until it is let go."""

    def __init__(self, run_dir: Path, claim: Claim) -> None:
        self.claim = claim
        self._path = run_dir / LOCK
        self._lost = threading.Event()
        self._done = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="mpt-lease", daemon=True)
        self._renewer.start()

    @property
    def lost(self) -> bool:
        """Whether another process has taken the run."""
        return self._lost.is_set()

    def holds(self) -> bool:
        """Read whether the run is still this process's; true where that cannot be read."""
        try:
            with self._path.open(encoding="utf-8") as file:
                claim = _read(file)
            if claim is not None and not self._is_mine(claim):
                self._lost.set()
        except OSError:
            pass
        return not self.lost

    def publish(self, *, address: str | None, ready: bool) -> None:
        """Say where nodes can join, and whether the run directory is prepared."""
        self.claim = replace(self.claim, address=address, ready=ready)
        with _locked(self._path) as file:
            if _read(file) != self.claim and not self._is_mine(_read(file)):
                self._lost.set()
                return
            _write(file, self.claim)

    def release(self) -> None:
        """Let go, so that the next to lead need not wait; what is prepared stays so."""
        self._done.set()
        self._renewer.join()
        with suppress(OSError), _locked(self._path) as file:
            if self._is_mine(_read(file)):
                _write(file, replace(self.claim, pid=NOBODY, address=None))

    def _is_mine(self, claim: Claim | None) -> bool:
        return claim is not None and claim.nonce == self.claim.nonce

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            # A file system in trouble stops nobody: who cannot write here cannot take it either.
            with suppress(OSError):
                # Without a lock: a launch that sleeps while it has it must not keep this one from
                # renewing. What is half-written is looked at again next time.
                with self._path.open(encoding="utf-8") as file:
                    claim = _read(file)
                if claim is not None and not self._is_mine(claim):
                    self._lost.set()
                    return
                os.utime(self._path)


@dataclass
class Rival:
    """Another launch's claim, and how long it has been silent by this process's own clock."""

    run_dir: Path
    node: str
    claim: Claim | None = None
    renewed: bool = False
    """It was seen alive: renewed while it was watched, or its process runs on this node."""
    _seen: tuple[str, int] | None = None
    _since: float = field(default_factory=time.monotonic)

    def look(self) -> bool:
        """Read the claim anew; return whether it may be taken: absent, let go of, or stale."""
        path = self.run_dir / LOCK
        before = time.monotonic()  # this process may fall asleep at any line from here on
        with _locked(path) as file:
            self.claim = _read(file)
            seen = None if self.claim is None else (self.claim.nonce, os.stat(path).st_mtime_ns)
        if self.claim is None or self.claim.pid == NOBODY:
            self.renewed = False
            return True
        if self.claim.node == self.node and self.claim.host == socket.gethostname():
            self.renewed = _started(self.claim.pid) == self.claim.started
            return not self.renewed
        if seen != self._seen:
            self.renewed = self._seen is not None and self._seen[0] == self.claim.nonce
            self._seen, self._since = seen, time.monotonic()
        return before - self._since > LEASE_S

    def take(self) -> Lease | None:
        """Take the run, if nobody has done so since the last look."""
        before = self.claim
        mine = Claim(
            os.getpid(),
            socket.gethostname(),
            self.node,
            _started(os.getpid()) or 0,
            secrets.token_hex(16),
        )
        with _locked(self.run_dir / LOCK) as file:
            if _read(file) != before:
                return None
            _write(file, mine)
        return Lease(self.run_dir, mine)


def take(run_dir: Path, node: str) -> Lease:
    """Take a run for this process alone.

    Raises:
        UsageError: if another process has it, naming pid@host.
    """
    rival = Rival(run_dir, node)
    while True:
        if rival.look() and (lease := rival.take()):
            return lease
        if rival.claim is not None and rival.renewed:
            raise taken(run_dir, rival.claim)
        time.sleep(_LOOK_S)


def taken(run_dir: Path, claim: Claim) -> UsageError:
    """Return the error of a launch that is refused."""
    return UsageError(
        f"{run_dir}: is being trained by {claim.holder}. "
        "Wait for it, stop it, or use another --run-dir."
    )


def read_claim(run_dir: Path) -> Claim | None:
    """Return the claim on a run directory as it stands, stale or not."""
    try:
        with (run_dir / LOCK).open(encoding="utf-8") as file:
            _lock(file, fcntl.LOCK_SH)
            return _read(file)
    except FileNotFoundError:
        return None


def holder(run_dir: Path) -> str | None:
    """Return pid@host of the launch that has a run directory, or None.

    A claim from another node counts until somebody has seen it go stale.
    """
    claim = read_claim(run_dir)
    if claim is None:
        return None
    rival = Rival(run_dir, claim.node)  # on its host its process can be looked for
    free = rival.look()
    return None if free or rival.claim is None else rival.claim.holder


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # the nonce is for its owner alone
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        _lock(file, fcntl.LOCK_EX)
        yield file


def _lock(file: TextIO, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        raise UsageError(
            f"{file.name}: cannot be locked: {error.strerror}. The run directory must be on a "
            "file system with locks."
        ) from error


def _read(file: TextIO) -> Claim | None:
    file.seek(0)
    try:
        return Claim(**json.loads(file.read()))
    except (ValueError, TypeError, RecursionError):  # empty, or its writer died between two calls
        return None


def _write(file: TextIO, claim: Claim) -> None:
    text = json.dumps(asdict(claim)) + "\n"
    file.seek(0)
    file.write(text)
    file.truncate()  # after the text: on a full disk, what is there already has its room
    file.flush()
    os.fsync(file.fileno())


def _started(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks since boot; None if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return _alive_elsewhere(pid)


def _alive_elsewhere(pid: int) -> int | None:
    """Where there is no /proc: 0 for a living process."""
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return 0
