"""Laws of the workers, on real processes: how they are started, how they end, that none stays."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpt.launch.attempt import MEMORY_FD, STORE_FD
from mpt.launch.pulse import PULSE_FD, Phase, anonymous_file
from mpt.launch.workers import Assignment, Workers
from tests.launch.stand_in import await_that, is_gone, ranks_do, said

Start = Callable[..., Workers]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts ranks that do what they are told, on the second of two nodes or on the first."""
    started: list[Workers] = []
    memory = [anonymous_file("test-memory") for _ in range(2)]
    store = socket.create_server(("127.0.0.1", 0))

    def start(body: str, *, nproc: int = 2, first_rank: int = 0, **environment: str) -> Workers:
        ranks_do(body, tmp_path, monkeypatch)
        place = Assignment(3, first_rank // 2, first_rank, nproc, 4, "host-a", 29500)
        workers = Workers(tmp_path, "a", place, environment, memory, store.fileno())
        started.append(workers)
        return workers

    yield start
    for workers in started:
        workers.kill()
        ended(workers).close()
    store.close()
    for descriptor in memory:
        os.close(descriptor)


def ended(workers: Workers) -> Workers:
    await_that(lambda: not workers.alive)
    return workers


@pytest.mark.parametrize("first_rank", [0, 2])
def test_each_rank_is_told_its_place_as_torchrun_tells_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_rank: int
) -> None:
    monkeypatch.setenv("RANK", "99")
    monkeypatch.setenv("FROM_THE_USER", "kept")
    workers = start("say(dict(os.environ))", first_rank=first_rank, OMP_NUM_THREADS="3")
    for local_rank in range(2):
        rank = first_rank + local_rank
        told = json.loads(said(tmp_path, rank).read_text())
        assert {key: told.get(key) for key in ENVIRONMENT} == ENVIRONMENT | {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(first_rank // 2),
        }
        assert {PULSE_FD, MEMORY_FD} <= told.keys()
        assert (STORE_FD in told) == (rank == 0), "the store is rank 0's"
    assert list(workers.pids) == [first_rank, first_rank + 1]


ENVIRONMENT = {
    "RANK": "",
    "LOCAL_RANK": "",
    "GROUP_RANK": "",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29500",
    "MPT_ATTEMPT": "3",
    "MPT_SUPERVISOR_PID": str(os.getpid()),
    "OMP_NUM_THREADS": "3",
    "FROM_THE_USER": "kept",
}


def test_each_rank_has_a_pulse_and_memory_and_the_first_one_the_store(
    start: Start, tmp_path: Path
) -> None:
    workers = start("""
        pulse = Pulse.inherited()
        pulse.beat(Phase.STEP, 5 + rank)
        os.pwrite(int(os.environ["MPT_MEMORY_FD"]), b"rank %d" % rank, 0)
        import socket
        if rank == 0:
            say(socket.socket(fileno=int(os.environ["MPT_STORE_FD"])).getsockname()[1])
        else:
            say(None)
        last()
    """)
    port = json.loads(said(tmp_path, 0).read_text())
    said(tmp_path, 1)
    beats = workers.beats()
    assert [(beats[rank].phase, beats[rank].step) for rank in (0, 1)] == [
        (Phase.STEP, 5),
        (Phase.STEP, 6),
    ]
    assert workers.step == 6
    socket.create_connection(("127.0.0.1", port)).close()


def test_they_are_the_processes_that_they_are_said_to_be(start: Start, tmp_path: Path) -> None:
    workers = start("say(os.getpid()); last()")
    pids = {rank: json.loads(said(tmp_path, rank).read_text()) for rank in (0, 1)}
    assert workers.pids == pids
    assert workers.alive == [0, 1]
    assert workers.new_faults() == []
    assert workers.exit_codes() == {}
    assert all(os.getpgid(pid) == pid for pid in pids.values()), "Ctrl-C is for the supervisor"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "fail('DataError', 3, step=7)",
            ("failed", "rank 0 failed: DataError: the reason", 3, "DataError"),
        ),
        ("sys.exit(9)", ("failed", "rank 0 ended with exit code 9", 9, "")),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            ("killed", "rank 0 was killed by SIGKILL", -9, "SIGKILL"),
        ),
        ("os.abort()", ("killed", "rank 0 was killed by SIGABRT", -6, "SIGABRT")),
        (
            "os.kill(os.getpid(), signal.SIGRTMIN + 3)",
            ("killed", "rank 0 was killed by signal 37", -37, "signal 37"),
        ),
    ],
)
def test_a_death_that_nobody_asked_for_is_reported_once_with_all_that_is_known(
    start: Start, body: str, expected: tuple[Any, ...]
) -> None:
    before = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    workers = ended(start(f"{before}Pulse.inherited().beat(Phase.STEP, 7)\n{body}", nproc=1))
    (fault,) = workers.new_faults()
    assert (fault.kind, fault.why, fault.exit_code, fault.error) == expected
    assert (fault.node, fault.rank, fault.step) == ("a", 0, 7)
    assert fault.detected_s is not None
    assert fault.detected_s >= 0.0
    assert workers.new_faults() == []
    assert workers.exit_codes() == {0: expected[2]}


@pytest.mark.parametrize("code", [0, 75, 76, 130])
def test_a_good_end_is_no_fault(start: Start, code: int) -> None:
    workers = ended(start(f"sys.exit({code})"))
    assert workers.new_faults() == []
    assert workers.exit_codes() == {0: code, 1: code}


def test_a_rank_that_was_killed_here_is_no_fault_however_often(start: Start) -> None:
    workers = start("say(0); last()")
    workers.kill()
    ended(workers)
    workers.kill()
    assert workers.new_faults() == []
    assert workers.exit_codes() == {0: -9, 1: -9}


def test_a_rank_that_died_before_it_could_be_killed_is_a_fault(start: Start) -> None:
    workers = start("sys.exit(9) if rank else last()")
    await_that(lambda: workers.alive == [0])
    workers.kill()
    ended(workers)
    assert [fault.rank for fault in workers.new_faults()] == [1]


@pytest.mark.parametrize("dies_first", [False, True])
def test_what_a_rank_has_started_ends_with_it(
    start: Start, tmp_path: Path, dies_first: bool
) -> None:
    workers = start(f"""
        import subprocess
        child = subprocess.Popen(["sleep", "1000"])
        say(child.pid)
        {"os._exit(1)" if dies_first else "last()"}
    """)
    children = [json.loads(said(tmp_path, rank).read_text()) for rank in (0, 1)]
    if dies_first:
        ended(workers)
    assert not any(is_gone(pid) for pid in children)
    workers.kill()
    ended(workers)
    await_that(lambda: all(is_gone(pid) for pid in children))


def test_a_rank_that_is_stopped_or_deaf_is_killed_all_the_same(
    start: Start, tmp_path: Path
) -> None:
    workers = start("""
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        say(0)
        last()
    """)
    for rank, pid in workers.pids.items():
        said(tmp_path, rank)
        os.kill(pid, signal.SIGSTOP)
    workers.kill()
    ended(workers)


def test_a_signal_reaches_every_rank_that_is_still_there(start: Start, tmp_path: Path) -> None:
    workers = start("""
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
        if rank == 0:
            sys.exit(0)
        say(0)
        last()
    """)
    said(tmp_path, 1)
    await_that(lambda: workers.alive == [1])
    workers.send_signal(signal.SIGUSR1)
    ended(workers)
    workers.send_signal(signal.SIGUSR1)  # to nobody
    assert workers.exit_codes() == {0: 0, 1: 75}


def test_if_one_cannot_be_started_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_do("say(os.getpid()); last()", tmp_path, monkeypatch)
    memory = [anonymous_file("test-memory"), 1 << 16]  # the second is no open file to inherit
    before = open_files()
    children = set(child_pids())
    place = Assignment(3, 0, 0, 2, 2, "127.0.0.1", 29500)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Workers(tmp_path, "a", place, {}, memory, None)
    assert set(child_pids()) == children, "not even one that nobody has asked for its exit code"
    assert len(open_files()) <= len(before) + 1, "but for the pulse of the one that failed"
    os.close(memory[0])


def open_files() -> list[str]:
    return os.listdir("/proc/self/fd")


def child_pids() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
