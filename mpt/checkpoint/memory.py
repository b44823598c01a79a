"""Copies of the training state in host memory that outlives a rank: a restart loses no step.

Each rank keeps two, in an anonymous file that its supervisor holds, and overwrites the older one.
So there is one that is whole at any instant, also when the rank is killed while it copies. Nothing
has a name in a file system: the memory is gone with the supervisor.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mpt.checkpoint.room import check_room, take_memory
from mpt.checkpoint.slot import STATE_BYTES, Layout, Slot
from mpt.dist import Ranks, any_rank, max_over_ranks
from mpt.launch.attempt import MEMORY_FD
from mpt.state import RunState

COST_SHARE = 0.02
"""Of the time of a step that copies may take, where their number is left to us."""
WARM_UP = 2
"""Steps before timing begins: the first one compiles, and both copies' pages are new."""
TIMED = 3
"""Steps that are timed."""

_MADV_POPULATE_WRITE = 23
"""Of <sys/mman.h>, since Linux 5.14: map all pages now; what is in them stays."""

Every = int | Literal["auto", "off"]
Report = Callable[..., None]
"""Called as report("memory_off", why=...), on every rank, if copies cannot be kept."""


class Memory:
    """This rank's two copies. Every rank calls each method at the same steps."""

    def __init__(
        self,
        descriptor: int | None,
        tensors: Mapping[str, Tensor],
        ranks: Ranks,
        *,
        every: Every,
        origin: Mapping[str, Any],
        report: Report,
    ) -> None:
        """Find the memory, and take what is missing of it; copies in it are left alone.

        Args:
            descriptor: of the file, which only this process and the supervisor know; None if there
                is none, and then no copy is ever due or found.
            every: steps between copies; auto measures how many keep their cost under `COST_SHARE`.
            origin: what else must be the same for a copy to be of this run: model, seed.
        """
        self._tensors = tensors
        self._ranks = ranks
        self._every = every
        self._report = report
        self._next = 0
        """Slot that the next copy goes to: the other one holds the newest."""
        self._found: list[dict[str, Any] | None] = []
        """What each slot held when it was last looked at."""
        self._sealing: threading.Thread | None = None
        self._seal_s = 0.0
        self._pace = _Pace()
        self._slots: list[Slot] = []
        if every != "off" and not any_rank(descriptor is None):
            assert descriptor is not None
            self._slots = self._open(descriptor, origin)

    @classmethod
    def inherited(
        cls,
        tensors: Mapping[str, Tensor],
        ranks: Ranks,
        *,
        every: Every,
        origin: Mapping[str, Any],
        report: Report,
    ) -> Memory:
        """Return the one in the memory that the supervisor gave this rank."""
        given = os.environ.get(MEMORY_FD)
        descriptor = int(given) if given else None
        return cls(descriptor, tensors, ranks, every=every, origin=origin, report=report)

    def due(self, step: int) -> bool:
        """Return whether a copy is to be taken after this step; asked after every step."""
        if not self._slots:
            return False
        if self._every == "auto":
            if not self._pace.known:
                return True
            self._every = max_over_ranks(self._pace.every())
        return step % int(self._every) == 0

    def take(self, state: RunState) -> None:
        """Copy the state; returns when it is copied, a moment before the copy counts."""
        record = state.to_json()
        if len(json.dumps(record)) > STATE_BYTES:
            self._slots = []
            why = f"no copies in memory: what goes with the weights is over {STATE_BYTES} bytes"
            self._report("memory_off", why=why)
            return
        self.wait()
        self._synchronize()  # the step that is still in the queue is no cost of the copy
        began = time.perf_counter()
        slot = self._slots[self._next]
        slot.fill(self._tensors)
        self._synchronize()
        self._next = 1 - self._next
        self._sealing = threading.Thread(target=self._seal, args=(slot, record), name="mpt-seal")
        self._sealing.start()
        on_gpu = self._ranks.device.type == "cuda"
        # On a CPU the checksum of the copy before took its time from the step.
        self._pace.copied(time.perf_counter() - began, 0.0 if on_gpu else self._seal_s)

    def wait(self) -> None:
        """Return once the latest copy counts."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None

    def newest_common(self) -> RunState | None:
        """Return the newest state of which every rank has a whole copy, or None.

        Ranks that were killed while they copied are one copy apart.
        """
        if not self._slots:
            return None
        self._found = [slot.read() for slot in self._slots]
        mine = torch.tensor([-1 if state is None else state["step"] for state in self._found])
        theirs = [torch.zeros_like(mine) for _ in range(self._ranks.world_size)]
        dist.all_gather(theirs, mine)
        common = set.intersection(*(set(steps.tolist()) for steps in theirs)) - {-1}
        return RunState.from_json(self._found[self._slot_of(max(common))]) if common else None

    def load(self, step: int) -> RunState:
        """Fill the tensors with the copy of `step`, which `newest_common` has found."""
        number = self._slot_of(step)
        # What is newer was not on all ranks: its step is taken again, maybe with other results.
        self._slots[1 - number].clear()
        self._next = 1 - number
        self._slots[number].pour(self._tensors)
        self._synchronize()
        return RunState.from_json(self._found[number])

    def forget(self) -> None:
        """Make all copies count for nothing: the run goes on from elsewhere."""
        self.wait()
        for slot in self._slots:
            slot.clear()

    def _slot_of(self, step: int) -> int:
        return [None if state is None else state["step"] for state in self._found].index(step)

    def _seal(self, slot: Slot, record: dict[str, Any]) -> None:
        began = time.perf_counter()
        slot.seal(record)
        self._seal_s = time.perf_counter() - began

    def _synchronize(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _open(self, descriptor: int, origin: Mapping[str, Any]) -> list[Slot]:
        """Return the slots, or none if a rank has no memory for them."""
        layout = Layout.of(self._tensors)
        wanted = 2 * layout.slot_bytes
        fresh = os.fstat(descriptor).st_size != wanted
        try:
            # All look before one of them takes: what is free, they share.
            self._together(lambda: check_room(wanted) if fresh else None)
            self._together(lambda: take_memory(descriptor, wanted) if fresh else None)
        except OSError as error:
            self._report("memory_off", why=f"no copies in memory: {error.strerror}")
            return []
        memory = mmap.mmap(descriptor, wanted)
        with suppress(OSError):  # an older kernel maps page by page, within the first steps
            memory.madvise(_MADV_POPULATE_WRITE)
        if self._ranks.device.type == "cuda":
            _register(memory)
        identity = _identity(origin, layout, self._ranks)
        return [Slot(memory, i * layout.slot_bytes, layout, identity) for i in range(2)]

    def _together(self, work: Callable[[], None]) -> None:
        """Do this rank's part; raise on all ranks if any failed."""
        failure: OSError | None = None
        try:
            work()
        except OSError as error:
            failure = error
        if any_rank(failure is not None):
            raise failure or OSError(errno.ENOMEM, "another rank has no memory for them")


class _Pace:
    """How long steps and copies take, measured over the first few of each."""

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._steps: list[float] = []
        self._since = time.perf_counter()

    def copied(self, blocked_s: float, beside_s: float) -> None:
        """A copy has just been taken; what went by since the one before was a step.

        Args:
            blocked_s: what the step after it waited for.
            beside_s: what it cost beside that.
        """
        now = time.perf_counter()
        if not self.known:
            self._costs.append(blocked_s + beside_s)
            self._steps.append(now - self._since - blocked_s)
        self._since = now

    @property
    def known(self) -> bool:
        return len(self._steps) >= WARM_UP + TIMED

    def every(self) -> int:
        """Return the steps between copies that this rank would have."""
        return fewest_steps(
            statistics.median(self._costs[WARM_UP:]), statistics.median(self._steps[WARM_UP:])
        )


def fewest_steps(cost_s: float, step_s: float) -> int:
    """Return the fewest steps between copies with which they cost less than `COST_SHARE`."""
    return max(1, math.ceil(cost_s / (COST_SHARE * step_s)))


def _identity(origin: Mapping[str, Any], layout: Layout, ranks: Ranks) -> str:
    """Return a hash of all that must be the same for a copy to be loaded."""
    pieces = [(name, str(dtype), shape, offset) for name, dtype, shape, offset in layout.pieces]
    whole = {"origin": origin, "pieces": pieces, "ranks": [ranks.rank, ranks.world_size]}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _register(memory: mmap.mmap) -> None:
    """Pin the pages, so that the GPU copies into them by itself; unpinned works too, slower."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    torch.cuda.cudart().cudaHostRegister(address, len(memory), 0)
