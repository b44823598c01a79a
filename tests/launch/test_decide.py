"""Laws of what a fault means: what is tried again, after how long, and which node is to blame."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt.launch.decide import GiveUp, History, Restart, decide, unreliable_nodes
from mpt.launch.fault import Fault, cause, lost_node
from mpt.log import Journal, read_lines
from mpt.rundir import EVENTS

PEER_GONE = [  # as torch 2.13 wrote them when the other of two ranks was killed
    "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
    "Connection closed by peer [127.0.0.1]:33985. This is typically caused by a remote worker "
    "crashing. Check the logs of the remote worker before reporting an error. GLHF! 🏖️",
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error "
    "[127.0.0.1]:50742: Connection reset by peer",
    "RuntimeError: [../gloo/transport/tcp/pair.cc:446] writev [127.0.0.1]:1449: Broken pipe",
    "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
    "server shutdown or crash?",
    "DistNetworkError: The client socket has timed out after 3000ms while trying to connect to "
    "(127.0.0.1, 29612).",
    "DistStoreError: Timed out after 4 seconds waiting for clients. 1/2 clients joined.",
    "DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, "
    "remote process exited or there was a network error, NCCL version 2.21.5",
]


def killed(step: int = 0, name: str = "SIGKILL", rank: int = 1, time: float = 0.0) -> Fault:
    why = f"rank {rank} was killed by {name}"
    return Fault("killed", "a", why, rank, step, 0.1, -9, name, time)


def failed(said: str, step: int = 0, code: int = 1, rank: int = 0, time: float = 0.0) -> Fault:
    why, error = f"rank {rank} failed: {said}", said.partition(":")[0]
    return Fault("failed", "a", why, rank, step, 0.1, code, error, time)


def restarts(faults: list[tuple[Fault, int]], history: History) -> list[Restart | GiveUp]:
    """Return the decisions on (fault, newest checkpoint) one after the other, to the first end."""
    decisions: list[Restart | GiveUp] = []
    for fault, committed in faults:
        history, decision = decide(
            history, fault, committed=committed, stepped=False, replaceable=False
        )
        decisions.append(decision)
        if isinstance(decision, GiveUp):
            break
    return decisions


@pytest.mark.parametrize(
    ("said", "code", "ends_with"),
    [
        ("UsageError: no such recipe", 2, 2),
        ("DataError: s3://bucket/shard: connection refused", 3, 3),
        ("CheckpointError: another model's", 4, 4),
        ("DivergedError: the loss is nan", 6, 6),
        ("ImportError: cannot import name 'nccl'", 1, 5),
        ("ModuleNotFoundError: No module named 'flash_attn'", 1, 5),
        ("TypeError: forward() got an unexpected keyword", 1, 5),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)", 1, 5),
        ("RuntimeError: The size of tensor a (3) must match the size of tensor b (4)", 1, 5),
        ("RuntimeError: shape '[3]' is invalid for input of size 4", 1, 5),
    ],
)
def test_what_only_a_person_can_mend_is_never_tried_again(
    said: str, code: int, ends_with: int
) -> None:
    fault = failed(said, step=7, code=code)
    _, decision = decide(
        History(max_restarts=10), fault, committed=5, stepped=False, replaceable=False
    )
    assert isinstance(decision, GiveUp)
    assert decision.exit_code == ends_with
    assert not fault.attributable, "no node is to blame for it"


def test_the_same_error_twice_in_a_row_at_the_same_step_ends_the_run_with_the_reason() -> None:
    one = failed("RuntimeError: CUDA error at 0x7f00, pid 41", step=12)
    same = failed("RuntimeError: CUDA error at 0x7fab, pid 52", step=12)
    decisions = restarts([(one, 10), (same, 10)], History(10))
    assert decisions[0] == Restart(0.0)
    assert decisions[1] == GiveUp(5, "twice in a row at step 12")


@pytest.mark.parametrize(
    "between",
    [
        [],
        [failed("RuntimeError: CUDA error", step=13)],
        [failed("RuntimeError: out of memory", step=12)],
        [killed(step=12)],
        [killed(step=12, name="SIGSEGV")],
    ],
)
def test_an_error_is_only_the_same_in_a_row_and_at_its_step(between: list[Fault]) -> None:
    again = failed("RuntimeError: CUDA error", step=12)
    decisions = restarts([(fault, 10) for fault in (again, *between, again)], History(10))
    assert isinstance(decisions[-1], Restart if between else GiveUp)


@pytest.mark.parametrize("fault", [killed(), failed(PEER_GONE[0]), lost_node("b", "gone", 0, 1.0)])
def test_what_comes_from_outside_is_never_the_same_error(fault: Fault) -> None:
    decisions = restarts([(fault, -1)] * 9, History(max_restarts=8))
    assert all(isinstance(decision, Restart) for decision in decisions[:8])
    assert decisions[8] == GiveUp(5, "no restarts are left of launch.max_restarts 8")


def test_a_crash_of_the_program_itself_can_be_the_same_error() -> None:
    crash = killed(step=3, name="SIGSEGV")
    assert isinstance(restarts([(crash, 2), (crash, 2)], History(10))[-1], GiveUp)


def test_waits_grow_while_no_new_step_is_made_and_vanish_with_one() -> None:
    stuck = [(killed(step=4), -1)] * 10
    decisions = restarts([*stuck, (killed(step=5), -1), (killed(step=5), -1)], History(100))
    waits = [decision.after_s for decision in decisions if isinstance(decision, Restart)]
    assert waits[0] == 0.0, "step 4 was new"
    assert waits[1:] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 0, 0]


def test_each_new_checkpoint_gives_all_restarts_back() -> None:
    faults = [(killed(step=s), c) for s, c in ((1, -1), (2, -1), (6, 5), (7, 5), (8, 5))]
    decisions = restarts(faults, History(max_restarts=2))
    assert [isinstance(decision, Restart) for decision in decisions] == [True] * 4 + [False]
    history, _ = decide(
        History(max_restarts=2), killed(step=1), committed=-1, stepped=False, replaceable=False
    )
    assert history.left == 1


def test_a_checkpoint_from_before_this_launch_gives_nothing_back() -> None:
    decisions = restarts([(killed(step=51), 50), (killed(step=52), 50)], History(1, committed=50))
    assert isinstance(decisions[1], GiveUp)


def test_twenty_kills_with_progress_are_twenty_restarts() -> None:
    faults = [(killed(step=10 * n + 3), 10 * n) for n in range(20)]
    assert restarts(faults, History(max_restarts=1)) == [Restart(0.0)] * 20


things = st.sampled_from(
    [killed(), killed(name="SIGABRT"), failed("RuntimeError: x"), failed(PEER_GONE[0])]
)


@given(
    st.lists(st.tuples(things, st.integers(0, 9), st.booleans()), max_size=60), st.integers(0, 5)
)
def test_between_two_checkpoints_there_are_never_more_restarts_than_allowed(
    course: list[tuple[Fault, int, bool]], max_restarts: int
) -> None:
    history, committed, since = History(max_restarts), -1, 0
    for fault, step, saved in course:
        if saved:
            committed, since = committed + 1, 0
        history, decision = decide(
            history,
            replace(fault, step=step),
            committed=committed,
            stepped=False,
            replaceable=False,
        )
        if isinstance(decision, GiveUp):
            break
        since += 1
        assert since <= max_restarts
        assert history.left == max_restarts - since
        assert 0.0 <= decision.after_s <= 60.0


@pytest.mark.parametrize("said", PEER_GONE)
def test_ranks_whose_peer_is_gone_are_not_the_cause(said: str) -> None:
    consequences = [failed(said, rank=rank, time=rank - 5.0) for rank in (0, 2)]
    assert all(fault.is_consequence and not fault.attributable for fault in consequences)
    root = killed(step=8)
    for faults in permutations([*consequences, root]):
        assert cause(faults) == root
    assert cause(consequences).rank == 0, "the earlier one, if there is nothing better"


@pytest.mark.parametrize(
    "said",
    [
        "ImportError: cannot import name 'nccl'",
        "RuntimeError: the state of step 5 cannot be restored",
        "KeyError: 'store'",
        "OSError: [Errno 5] Input/output error: '/mnt/object-store/shard.mds'",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    ],
)
def test_an_error_of_its_own_is_no_consequence(said: str) -> None:
    assert not failed(said).is_consequence


ROOTS = [
    failed("RuntimeError: size mismatch, got 3", time=9.0),
    lost_node("b", "it closed the connection", 3, 0.1),
    killed(name="SIGABRT", time=8.0),
    Fault("hang", "a", "rank 1 is stuck", 1, 3, error="hang"),
    failed("RuntimeError: CUDA error", time=7.0),
    failed(PEER_GONE[0], time=1.0),
]


@pytest.mark.parametrize(("first", "second"), list(pairwise(ROOTS)))
def test_a_mistake_comes_before_a_loss_a_kill_a_hang_an_error_a_consequence(
    first: Fault, second: Fault
) -> None:
    assert cause([first, second]) == cause([second, first]) == first


NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def event(node: str = "a", hours_ago: float = 1.0, **other: Any) -> dict[str, Any]:
    time = (NOW - timedelta(hours=hours_ago)).isoformat()
    return {"event": "fault", "attributable": True, "node": node, "time": time, **other}


@pytest.mark.parametrize(
    ("events", "bad"),
    [
        ([], set()),
        ([event()], set()),
        ([event(), event("b")], set()),
        ([event(), event()], {"a"}),
        ([event(), event(hours_ago=24.0)], {"a"}),
        ([event(), event(hours_ago=24.01)], set()),
        ([event(), event(attributable=False)], set()),
        ([event(), event(event="restart")], set()),
        ([event("a"), event("b"), event("b"), event("a", 30.0)], {"b"}),
    ],
)
def test_a_node_is_bad_after_two_failures_of_its_own_in_a_day(
    events: list[dict[str, Any]], bad: set[str]
) -> None:
    assert unreliable_nodes(events, NOW) == bad


def test_what_is_written_of_faults_is_what_nodes_are_judged_by(tmp_path: Path) -> None:
    consequence, mistake = failed(PEER_GONE[0]), failed("ImportError: no")
    for fault in (killed(), consequence, mistake, lost_node("b", "gone", 0, 1.0), killed()):
        Journal(tmp_path).event("fault", **fault.event())
    assert unreliable_nodes(read_lines(tmp_path / EVENTS), datetime.now(UTC)) == {"a"}


@pytest.mark.parametrize(
    "line",
    [
        {"time": None},
        {"time": "yesterday"},
        {"time": "2026-11-21T11:00:00"},  # without a zone
        {"node": ["a"]},
    ],
)
def test_a_line_that_is_no_event_of_ours_stops_nothing(line: dict[str, Any]) -> None:
    assert unreliable_nodes([event(), event() | line, event("b"), event("b")], NOW) == {"b"}
