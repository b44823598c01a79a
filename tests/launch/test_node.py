"""Laws of a node, on real processes: it does as it is told, and reports all that it sees."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from mpt.launch.node import Node
from mpt.launch.pulse import Beat
from mpt.launch.wire import Message
from mpt.launch.workers import Workers
from mpt.recipe.launch import Hang
from tests.launch.stand_in import await_that, is_gone, ranks_do, said

NPROC = 2
STAY = "say(os.getpid()); last()"


class Crew:
    """A node, what it has reported, and what its ranks are to do."""

    def __init__(self, run_dir: Path, tell: Callable[[str], None], hang: Hang) -> None:
        self.node = Node(run_dir, "a", nproc=NPROC, environment={}, hang=hang, on_gpus=False)
        self.reports: list[Message] = []
        self._run_dir = run_dir
        self._tell = tell
        self._attempt = 0

    def turn(self) -> list[Message]:
        """Let it look once; return what it reports, but for its beats."""
        reports = [report for report in self.node.turn() if report["kind"] != "beat"]
        self.reports += reports
        return reports

    def hear(self, kind: str) -> Message:
        """Return the next report of a kind; those before it are passed over."""

        def found() -> Message | None:
            self.turn()
            kinds = [report["kind"] for report in self.reports]
            if kind not in kinds:
                return None
            report = self.reports[kinds.index(kind)]
            del self.reports[: kinds.index(kind) + 1]
            return report

        report: Message = await_that(found)
        return report

    def start(self, body: str, *, keep_memory: bool = True) -> None:
        self.hear("ready")
        self._tell(body)
        for said_before in self._run_dir.glob("rank-*.said"):
            said_before.unlink()
        place = {
            "attempt": self._attempt,
            "node_rank": 0,
            "first_rank": 0,
            "nproc": NPROC,
            "world_size": NPROC,
            "store_host": "127.0.0.1",
            "store_port": 1,
        }
        self._attempt += 1
        self.node.handle({"kind": "start", "assignment": place, "keep_memory": keep_memory})

    def said(self, rank: int) -> object:
        return json.loads(said(self._run_dir, rank).read_text())


@pytest.fixture
def new_crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Crew]]:
    crews: list[Crew] = []

    def new_crew(hang: Hang | None = None) -> Crew:
        tell = partial(ranks_do, tmp_path=tmp_path, monkeypatch=monkeypatch)
        crews.append(Crew(tmp_path, tell, hang or Hang()))
        return crews[-1]

    yield new_crew
    for crew in crews:
        crew.node.close()


@pytest.fixture
def crew(new_crew: Callable[..., Crew]) -> Crew:
    return new_crew()


def test_a_node_that_is_ready_says_so_once_and_listens_where_it_says(crew: Crew) -> None:
    ready = crew.hear("ready")
    assert ready["nproc"] == NPROC
    socket.create_connection(("127.0.0.1", ready["port"])).close()
    assert [crew.turn() for _ in range(3)] == [[]] * 3
    crew.node.join()
    assert crew.hear("ready")["nproc"] == NPROC, "another one leads, who knows nothing of it"


def test_an_attempt_goes_from_started_to_ended_to_ready(crew: Crew) -> None:
    crew.start("""
        pulse = Pulse.inherited()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        pulse.beat(Phase.FIRST_STEP, 4)
        say(os.getpid())
        while not os.path.exists(run_dir / "go"):
            time.sleep(0.005)
        pulse.beat(Phase.STEP, 5)
        last()
    """)
    pids = [crew.said(rank) for rank in range(NPROC)]
    assert crew.hear("started")["pids"] == pids
    assert crew.turn() == [], "its first step, which compiles, is not done"
    (crew._run_dir / "go").touch()
    assert crew.hear("running")["step"] == 5
    assert crew.turn() == []
    crew.node.handle({"kind": "signal", "number": int(signal.SIGTERM)})
    assert crew.hear("ended")["codes"] == [75]
    assert crew.reports == []
    assert crew.turn()[0]["kind"] == "ready"


def test_beats_say_how_far_it_is(crew: Crew) -> None:
    crew.start("Pulse.inherited().beat(Phase.STEP, 5 + rank); say(0); last()")
    for rank in range(NPROC):
        crew.said(rank)
    beats: list[Message] = []

    def beat() -> bool:
        beats.extend(report for report in crew.node.turn() if report["kind"] == "beat")
        return bool(beats) and beats[-1]["step"] == 6

    await_that(beat)
    crew.node.clear()
    assert crew.node.step == 6, "what it leaves to account for"


def test_a_fault_is_reported_and_the_rest_stays_until_it_is_killed(crew: Crew) -> None:
    crew.start("fail('RuntimeError', 1, step=3) if rank else last()")
    (fault,) = crew.hear("faults")["faults"]
    assert (fault["rank"], fault["why"]) == (1, "rank 1 failed: RuntimeError: the reason")
    assert [crew.turn() for _ in range(3)] == [[]] * 3, "nothing is ready, nothing has ended"
    assert crew.node.is_running
    crew.node.handle({"kind": "kill"})
    crew.hear("ready")
    assert not crew.node.is_running
    assert crew.reports == [], "what was killed here is no fault, and no end"


@pytest.mark.parametrize("code", [1, 75])
def test_ranks_that_die_between_two_looks_are_not_overlooked(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    crew.start(f"signal.signal(signal.SIGTERM, lambda *_: os._exit({code})); say(0); last()")
    for rank in range(NPROC):
        crew.said(rank)
    beats = Workers.beats

    def beats_and_all_die(workers: Workers) -> dict[int, Beat]:
        for pid in workers.pids.values():
            os.kill(pid, signal.SIGTERM)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return beats(workers)

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "beats", beats_and_all_die)  # after it asked who has failed
        crew.turn()
    wanted = "ended" if code == 75 else "faults"
    assert [report["kind"] for report in crew.reports] == ["started", wanted]


def test_a_node_that_could_not_start_its_ranks_says_why_and_is_ready_again(
    crew: Crew, tmp_path: Path
) -> None:
    (tmp_path / "logs").touch()  # where a directory should be
    crew.start(STAY)
    (fault,) = crew.hear("faults")["faults"]
    assert fault["why"].startswith("node a cannot start workers: ")
    (tmp_path / "logs").unlink()
    crew.start(STAY)
    assert len(crew.hear("started")["pids"]) == NPROC


@pytest.mark.parametrize("keep_memory", [True, False])
def test_memory_outlives_a_rank_unless_it_is_to_be_dropped(crew: Crew, keep_memory: bool) -> None:
    crew.start("os.pwrite(int(os.environ['MPT_MEMORY_FD']), b'%d' % (7 + rank), 0)")
    assert crew.hear("ended")["codes"] == [0]
    read = "say(os.pread(int(os.environ['MPT_MEMORY_FD']), 9, 0).decode())"
    crew.start(read, keep_memory=keep_memory)
    assert [crew.said(rank) for rank in range(NPROC)] == (["7", "8"] if keep_memory else ["", ""])


def test_silent_ranks_are_reported_once_and_asked_where_they_are(
    new_crew: Callable[..., Crew],
) -> None:
    crew = new_crew(Hang(min_s=0.3, factor=1.0, start_s=30.0))
    crew.start("""
        from mpt.launch.stacks import answer_stack_signal, stack_file
        from mpt.launch.attempt import attempt_dir
        answer_stack_signal(stack_file(attempt_dir(run_dir, 0), rank))
        Pulse.inherited().beat(Phase.STEP, 3)
        say(0)
        last()
    """)
    crew.hear("hung")
    assert [crew.turn() for _ in range(3)] == [[]] * 3
    crew.node.handle({"kind": "dump", "attempt": 0})
    assert crew.turn() == [], "it goes on with its beats while they write"
    ranks = crew.hear("stacks")["ranks"]
    assert [(state["rank"], state["step"], state["node"]) for state in ranks] == [
        (0, 3, "a"),
        (1, 3, "a"),
    ]
    assert all("in last" in state["dump"] for state in ranks)
    json.dumps(ranks)


def test_what_ranks_leave_running_at_a_good_end_is_ended(crew: Crew) -> None:
    crew.start("import subprocess; say(subprocess.Popen(['sleep', '1000']).pid); os._exit(0)")
    crew.hear("ended")
    for rank in range(NPROC):
        pid = crew.said(rank)
        assert isinstance(pid, int)
        await_that(partial(is_gone, pid))


def test_orders_that_come_too_late_do_nothing(crew: Crew) -> None:
    for order in (
        {"kind": "kill"},
        {"kind": "signal", "number": 15},
        {"kind": "alive"},
        {"kind": "of a later version"},
    ):
        crew.node.handle(order)
    crew.node.handle({"kind": "dump", "attempt": 0})
    assert crew.hear("stacks")["ranks"] == []
    crew.node.clear()


def test_a_node_leaves_no_process_and_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    crew = Crew(tmp_path, partial(ranks_do, tmp_path=tmp_path, monkeypatch=monkeypatch), Hang())
    for _ in range(2):
        crew.start(STAY)
        pids = crew.hear("started")["pids"]
        crew.node.handle({"kind": "kill"})
        await_that(lambda: not crew.node.is_running)
        crew.turn()
    crew.start(STAY)
    pids = crew.hear("started")["pids"]
    crew.node.clear()
    assert all(is_gone(pid) for pid in pids)
    assert not crew.node.is_running
    crew.node.close()
    assert len(os.listdir("/proc/self/fd")) == before
