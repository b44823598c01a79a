"""Batches tokenized by several processes, and given back in their order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from mpt.data.batches import Batch, Split
from mpt.errors import DataError
from mpt.tokenizer import Tokenizer

Work = Iterator[tuple[Batch, list[Split]]]
"""Batches, each with the splits that its tokens are wanted for."""
R = TypeVar("R")
Made = TypeVar("Made", covariant=True)


class Job(Protocol[Made]):
    """What is done with a batch: an Encoder's work, or a Judge's."""

    @property
    def tokenizer(self) -> Tokenizer:
        """By whose hash a worker shows that it has the same."""

    def encode(self, texts: Sequence[bytes], wanted: Sequence[Split]) -> Made:
        """Do it here."""

    def arguments(self) -> list[str]:
        """Return what a worker is told so that it does the same, its tokenizer aside."""

    def descriptors(self) -> list[int]:
        """Return the open files that a worker must have too."""

    def unpack(self, head: dict[Any, Any], payload: bytes, n: int) -> Made:
        """Return what a worker answered on n documents."""


PER_WORKER = 2
"""Batches under way per worker: one in its hands, one ready for it."""
IN_FLIGHT_BYTES = 1 << 28
"""Text of all batches under way, unless a single one is larger."""
PATIENCE_S = 120.0
SLOWEST_BYTES_S = 20_000
"""A worker that takes longer than this for a batch, a hundredth of its speed, does not answer."""
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def encoded(work: Work, job: Job[R], tokenizer: Path, workers: int) -> Iterator[tuple[Batch, R]]:
    """Yield each batch with its result, in order; by one worker, or for one batch, in here.

    Raises:
        DataError: a worker cannot be started, or dies; names its batch. None is left running.
    """
    head = list(islice(work, 2))
    work = chain(head, work)
    if workers == 1 or len(head) < 2:
        for batch, wanted in work:
            try:
                result = job.encode(batch.texts, wanted)
            except DataError as error:
                raise DataError(f"{batch.first} to {batch.last}: {error}") from error
            yield batch, result
        return
    with _Pool(job, tokenizer, workers) as pool:
        yield from pool.encoded(work)


class _Pool(Generic[R]):
    """Worker processes, each with a thread here that waits for it."""

    def __init__(self, job: Job[R], tokenizer: Path, workers: int) -> None:
        self._workers: list[_Worker[R]] = []
        self._idle: SimpleQueue[_Worker[R]] = SimpleQueue()
        self._holders: dict[int, _Worker[R]] = {}
        self._most = PER_WORKER * workers
        self._threads = ThreadPoolExecutor(workers)
        try:
            for _ in range(workers):
                self._workers.append(_Worker(job, tokenizer))
        except OSError as error:
            self._end()
            raise DataError(
                f"tokenizing process {len(self._workers) + 1} of {workers} cannot be started: "
                f"{error}; use fewer --workers."
            ) from error
        except BaseException:  # Ctrl-C
            self._end()
            raise
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> _Pool[R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._end()

    def encoded(self, work: Work) -> Iterator[tuple[Batch, R]]:
        """Yield each batch with its result; only so many are under way at a time."""
        waiting: deque[tuple[Batch, Future[R]]] = deque()
        under_way = 0  # bytes of text
        for batch, wanted in work:
            size = batch.text_bytes
            while waiting and (len(waiting) >= self._most or under_way + size > IN_FLIGHT_BYTES):
                done, future = waiting.popleft()
                under_way -= done.text_bytes
                yield done, self._result(done, future)
            waiting.append((batch, self._threads.submit(self._encode, batch, wanted)))
            under_way += size
        while waiting:
            done, future = waiting.popleft()
            yield done, self._result(done, future)

    def _result(self, batch: Batch, future: Future[R]) -> R:
        """Wait for the oldest batch, which always has a worker; DataError if that is stuck."""
        limit_s = PATIENCE_S + batch.text_bytes / SLOWEST_BYTES_S
        wait([future], limit_s)
        if not future.done():
            worker = self._holders.get(batch.number)
            who = f", {worker.process.pid} ({worker.state()})," if worker else ""
            raise DataError(
                f"{batch.first} to {batch.last}: the process that tokenizes them{who} has not "
                f"answered for {limit_s:.0f} s. Finished shards are kept: the same command goes on "
                "from there."
            )
        return future.result()

    def _encode(self, batch: Batch, wanted: list[Split]) -> R:
        worker = self._idle.get()
        self._holders[batch.number] = worker
        try:
            return worker.encode(batch, wanted)
        finally:
            del self._holders[batch.number]
            self._idle.put(worker)

    def _end(self) -> None:
        """Leave neither process nor thread nor open line."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._threads.shutdown(cancel_futures=True)  # they saw the end of their workers
        for worker in self._workers:
            worker.close()


class _Worker(Generic[R]):
    """One process, and the line to it."""

    def __init__(self, job: Job[R], tokenizer: Path) -> None:
        self._line, theirs = Pipe()
        self._job = job
        self._greeted = False
        told = [str(theirs.fileno()), str(os.getpid()), str(tokenizer), *job.arguments()]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mpt.data.worker", *told],
                pass_fds=[theirs.fileno(), *job.descriptors()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for us: we end them
                env=os.environ | ONE_THREAD,
            )
        except OSError:
            self._line.close()
            raise
        finally:
            theirs.close()

    def encode(self, batch: Batch, wanted: list[Split]) -> R:
        """Have a batch tokenized. Raises DataError if the worker says so, or dies."""
        try:
            if not self._greeted:
                self._greet()
            request = {"wanted": wanted, "sizes": [len(text) for text in batch.texts]}
            self._line.send_bytes(json.dumps(request).encode())
            self._line.send_bytes(b"".join(batch.texts))
            answer = _receive(self._line, batch)
            payload = self._line.recv_bytes()
        except (EOFError, OSError) as cause:
            raise DataError(
                f"{batch.first} to {batch.last}: the process that tokenized them {self._end()}. "
                "Finished shards are kept: the same command goes on from there. If memory was "
                "short, use fewer --workers."
            ) from cause
        return self._job.unpack(answer, payload, len(batch.texts))

    def state(self) -> str:
        """Say what the process is doing, by the system's word for it."""
        try:
            status = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "it is gone"
        letter = status.rpartition(")")[2].split()[0]
        return {"T": "it is stopped", "D": "it waits for a disk"}.get(letter, "it runs")

    def close(self) -> None:
        self._line.close()

    def _greet(self) -> None:
        hello = _receive(self._line, None)
        if hello["sha256"] != self._job.tokenizer.sha256:
            raise DataError("the tokenizer was changed while it was in use; run this again.")
        self._greeted = True

    def _end(self) -> str:
        code = self.process.wait()  # its end of the line is closed, so it is ending
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _receive(line: Connection, batch: Batch | None) -> dict[Any, Any]:
    message: dict[Any, Any] = json.loads(line.recv_bytes())
    if "error" in message:
        where = f"{batch.first} to {batch.last}: " if batch else ""
        raise DataError(f"{where}{message['error']}")
    return message
