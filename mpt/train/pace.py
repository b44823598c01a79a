"""The time of each rank's own work in a step, taken and compared; a rank that is slow is named.

A step takes equally long on all ranks, since they wait for each other in collectives. What is left
when that waiting is taken away tells them apart. Nothing is done about it but to say so.
"""

from __future__ import annotations

import math
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mpt.display import Display
from mpt.dist import Ranks, of_all_ranks
from mpt.launch.attempt import this_attempt
from mpt.log import Journal
from mpt.train.straggler import WINDOW, Busy, Slow, Suspicion, slow_ranks

Waiting = Callable[[], AbstractContextManager[None]]
"""with waiting(): around a collective, to say that it is no work of this rank's own."""


class Clock(Protocol):
    """Marks moments, and tells later how far apart they were."""

    def mark(self) -> Any: ...

    def passed(self, mark: Any) -> bool:
        """Whether the moment has come."""
        ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """For a CPU, where a collective holds up the thread that calls it."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """For a GPU, where collectives are queued: moments are when the queue has come to them.

    A mark around a wait of the host lies in the queue too, and counts only for as long as the GPU
    had nothing to do meanwhile: as it should. Reading them never waits.
    """

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # on the current stream, which is FSDP's own around its collectives
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1000.0


class Pace:
    """Takes the time of this rank's own work in each step, and compares it with the others'."""

    def __init__(self, ranks: Ranks, journal: Journal, display: Display) -> None:
        """Begin outside of a step. Every rank must call it: they tell each other their hosts."""
        self._ranks, self._journal, self._display = ranks, journal, display
        self._clock: Clock = DeviceClock() if ranks.device.type == "cuda" else HostClock()
        self._hosts = of_all_ranks(socket.gethostname())
        self._began: Any = None
        self._waits: list[tuple[Any, Any]] | None = None
        """In the step that goes on; None outside of one, and on a single rank."""
        self._unread: deque[tuple[Any, list[tuple[Any, Any]], Any]] = deque()
        self._seconds: list[float] = []
        self._steps = -1  # the first one compiles, and does not count
        self._suspicion = Suspicion()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what is done in it as waiting for others."""
        if self._waits is None:
            yield
            return
        start = self._clock.mark()
        yield
        self._waits.append((start, self._clock.mark()))

    def begin(self) -> None:
        """A step begins."""
        if self._ranks.world_size > 1:
            self._began, self._waits = self._clock.mark(), []

    def end(self, step: int) -> None:
        """The step that began is done, or queued; every so many, all ranks compare."""
        if self._waits is None:
            return
        self._unread.append((self._began, self._waits, self._clock.mark()))
        self._waits = None
        while self._unread and self._clock.passed(self._unread[0][-1]):
            self._seconds.append(own_work_s(self._clock, *self._unread.popleft()))
        self._steps += 1
        if self._steps == 0:
            self._seconds.clear()
        elif self._steps % WINDOW == 0:
            self._compare(step)

    def _compare(self, step: int) -> None:
        busy = _exchange(self._seconds, self._ranks.world_size)
        self._seconds.clear()
        if not self._ranks.is_first:
            return
        self._suspicion, named, cleared = self._suspicion.after(slow_ranks(busy))
        for slow in named:
            self._name(slow, step)
        for rank in cleared:
            self._clear(rank, step)

    def _name(self, slow: Slow, step: int) -> None:
        host = self._hosts[slow.rank]
        why = (
            f"rank {slow.rank} on {host} is slow: {slow.busy_s * 1e3:.0f} ms of its own work a "
            f"step, {slow.excess_s * 1e3:.0f} ms more than the others, who wait for it"
        )
        self._journal.event(
            "straggler",
            attempt=this_attempt(),
            rank=slow.rank,
            host=host,
            step=step,
            busy_s=round(slow.busy_s, 5),
            others_s=round(slow.others_s, 5),
            excess_s=round(slow.excess_s, 5),
            why=why,
        )
        self._display.note(f"step {step:,}: {why}", "yellow")

    def _clear(self, rank: int, step: int) -> None:
        why = f"rank {rank} on {self._hosts[rank]} is as fast as the others again"
        self._journal.event(
            "straggler_recovered",
            attempt=this_attempt(),
            rank=rank,
            host=self._hosts[rank],
            step=step,
            why=why,
        )
        self._display.note(f"step {step:,}: {why}")


def own_work_s(clock: Clock, began: Any, waits: Sequence[tuple[Any, Any]], ended: Any) -> float:
    """Return the seconds of a step outside of its waits, which may overlap on a GPU."""
    total = clock.seconds(began, ended)
    spans = sorted((clock.seconds(began, start), clock.seconds(began, end)) for start, end in waits)
    waited = reach = 0.0
    for start, end in spans:
        waited += max(0.0, min(end, total) - max(start, reach))
        reach = max(reach, end)
    return total - waited


def time_collectives(model: nn.Module, waiting: Waiting) -> None:
    """Have FSDP's collectives count as waiting; they do what they did.

    Where a version of torch has no place for it, all ranks look equally busy and none is named.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
            DefaultAllGather,
            DefaultReduceScatter,
        )
    except ImportError:
        return

    class AllGather(DefaultAllGather):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with waiting():
                return super().__call__(*args, **kwargs)

    class ReduceScatter(DefaultReduceScatter):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with waiting():
                return super().__call__(*args, **kwargs)

    for module in model.modules():
        if isinstance(module, FSDPModule) and hasattr(module, "set_custom_all_gather"):
            module.set_custom_all_gather(AllGather())
            module.set_custom_reduce_scatter(ReduceScatter())


def _exchange(seconds: Sequence[float], world_size: int) -> list[Busy]:
    """Return the window of every rank."""
    ordered = sorted(seconds)
    n = len(ordered)
    mine = (ordered[n // 4], ordered[n // 2], ordered[n - 1 - n // 4]) if n else (math.nan,) * 3
    rows = [torch.zeros(3, dtype=torch.float64) for _ in range(world_size)]
    dist.all_gather(rows, torch.tensor(mine, dtype=torch.float64))
    return [Busy(*row.tolist()) for row in rows]
