"""Laws of the coordinator on a played cluster: how a run stops, when it ends, and who leads it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mpt.launch.coordinator import SETTLE_S
from mpt.launch.ending import End
from mpt.launch.fault import lost_node
from mpt.launch.gather import GIVE_WAY_S
from tests.launch.cluster import Cluster, cluster, failed, killed, peer_gone, running


def ended(cl: Cluster) -> End:
    """Return the end, which every node that is there has been told."""
    end = cl.coordinator.end
    assert end is not None
    order = {"kind": "end", "exit_code": end.exit_code, "why": end.why}
    assert cl.orders("end") == [(name, order) for name in sorted(cl.coordinator.members)]
    before = len(cl.events)
    cl.pass_time(100.0)
    assert cl.orders() == [], "an end is an end"
    assert len(cl.events) == before
    return end


def test_a_run_is_done_when_all_workers_are(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", "spare")
    cl.end_with("a", codes=[0])
    cl.pass_time(2.0)
    assert cl.coordinator.end is None
    cl.coordinator.left("a", "it closed the connection", cl.now)  # it has nothing left to do
    cl.end_with("b", codes=[0])
    cl.pass_time()
    assert ended(cl) == End(0)
    assert cl.recorded("fault") == []


def test_when_the_restarts_are_used_up_all_nodes_are_told_and_a_person_what_to_do(
    tmp_path: Path,
) -> None:
    cl = running(tmp_path, 1, "a", "spare", max_restarts=2)
    node = "a"
    for left in (1, 0):
        cl.fail(node, killed(node))
        cl.pass_time()
        assert cl.recorded("fault")[-1]["restarts_left"] == left
        cl.ready(node)
        cl.pass_time(2.0)
        (node,) = cl.begin(cl.orders("start"))
    cl.fail(node, killed(node))
    cl.pass_time()
    end = ended(cl)
    assert end.exit_code == 5
    assert end.why.startswith("rank 0 was killed by SIGKILL; no restarts are left of ")
    assert f"see {tmp_path}/logs" in end.why
    assert end.why.endswith(f"mpt resume {tmp_path}")
    assert len(cl.recorded("fault")) == 3
    assert len(cl.recorded("gave_up")) == 1


def test_a_new_checkpoint_gives_the_restarts_back(tmp_path: Path) -> None:
    cl = running(tmp_path, 1, "a", max_restarts=1)
    for step in range(6, 26):
        cl.committed = step
        cl.fail("a", killed("a", step=step))
        cl.pass_time()
        cl.ready("a")
        assert cl.start(step=step + 1) == ["a"], "at once, because it gets further"


def test_faults_without_progress_are_followed_by_growing_waits(tmp_path: Path) -> None:
    cl = running(tmp_path, 1, "a")
    waits = []
    for _ in range(4):
        cl.fail("a", killed("a"))
        cl.pass_time()
        cl.ready("a")
        since = cl.now
        while not (orders := cl.orders("start")):
            cl.pass_time()
        waits.append(round(cl.now - since))
        cl.begin(orders)
    assert waits == [0, 1, 2, 4]
    assert "restarting in 4 s (6 restarts left)." in cl.said[-1]


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_a_mistake_of_the_users_ends_the_run_in_the_words_of_the_worker(
    tmp_path: Path, code: int
) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.fail("a", peer_gone("a"))
    cl.fail("b", failed("b", "DataError: shard-3: is corrupt. Make it anew.", code=code))
    cl.pass_time()
    assert cl.ordered()[:2] == [("a", "kill"), ("b", "kill")]
    assert cl.coordinator.end == End(code, "shard-3: is corrupt. Make it anew.")
    assert cl.recorded("fault") == []


def test_a_mistake_in_the_program_ends_the_run_without_a_restart(tmp_path: Path) -> None:
    cl = cluster(tmp_path, 1)
    cl.come("a")
    cl.start()
    cl.fail("a", failed("a", "ImportError: No module named 'flash_attn'"))
    cl.pass_time()
    end = ended(cl)
    assert end.exit_code == 5
    assert "ImportError: No module named 'flash_attn'; the same would happen again" in end.why


def test_what_looks_like_a_mistake_after_many_steps_is_tried_once_more(tmp_path: Path) -> None:
    cl = running(tmp_path, 1, "a")
    for _ in range(2):
        assert cl.coordinator.end is None
        cl.fail("a", failed("a", "IndexError: list index out of range", step=5))
        cl.pass_time()
        cl.ready("a")
        if cl.coordinator.end is None:
            cl.start(step=5)
    assert ended(cl).exit_code == 5


def test_the_same_signal_from_all_nodes_is_one_request(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.report("a", "stop", number=int(signal.SIGINT))
    cl.report("b", "stop", number=int(signal.SIGINT))
    cl.pass_time()
    order = {"kind": "signal", "number": int(signal.SIGINT)}
    assert cl.orders("signal") == [("a", order), ("b", order)], "a second one would end them now"


def test_a_node_that_fails_the_same_way_twice_is_replaced_if_it_can_be(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", "spare")
    broken = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    for _ in range(2):
        cl.fail("b", failed("b", broken, step=5))
        cl.pass_time()
        assert cl.coordinator.end is None
        cl.ready("a", "b")
        nodes = cl.start(step=5)
    assert nodes == ["a", "spare"]
    cl.fail("spare", failed("spare", broken, step=5))
    cl.pass_time()
    assert ended(cl).exit_code == 5, "it was not the node"


def test_copies_in_memory_of_a_node_that_was_away_are_not_kept(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", "spare")
    cl.fail("a", killed("a", step=5))
    cl.pass_time()
    cl.coordinator.left("b", "it closed the connection", cl.now)
    cl.ready("a")
    cl.pass_time()
    kept = {name: order["keep_memory"] for name, order in cl.orders("start")}
    assert kept == {"a": True, "spare": False}


def test_a_rollback_starts_again_without_copies_in_memory_and_costs_nothing(
    tmp_path: Path,
) -> None:
    cl = running(tmp_path, 2, "a", "b", max_restarts=0)
    for _ in range(3):
        cl.end_with("a", "b", codes=[76])
        cl.pass_time()
        cl.pass_time()
        orders = cl.orders()
        assert [(name, o["kind"], o["keep_memory"]) for name, o in orders] == [
            ("a", "start", False),
            ("b", "start", False),
        ]
        cl.begin(orders)
    assert cl.recorded("fault") == []
    cl.end_with("a", "b", codes=[0])
    cl.pass_time()
    assert ended(cl) == End(0)


def test_only_the_attempt_after_a_rollback_goes_without_copies(tmp_path: Path) -> None:
    cl = running(tmp_path, 1, "a")
    cl.end_with("a", codes=[76])
    cl.pass_time()
    assert cl.start() == ["a"]
    cl.fail("a", killed("a"))
    cl.pass_time()
    cl.ready("a")
    cl.pass_time()
    assert [order["keep_memory"] for _, order in cl.orders("start")] == [True]


@pytest.mark.parametrize(
    ("number", "worker_code", "code"),
    [(signal.SIGTERM, 75, 75), (signal.SIGUSR1, 75, 75), (signal.SIGINT, 130, 130)],
)
def test_a_stop_signal_goes_to_all_nodes_and_ends_the_run_once_all_have_saved(
    tmp_path: Path, number: int, worker_code: int, code: int
) -> None:
    cl = running(tmp_path, 2, "a", "b", "spare")
    cl.report("b", "stop", number=int(number))
    order = {"kind": "signal", "number": number}
    assert cl.orders() == [("a", order), ("b", order)]
    cl.end_with("a", codes=[worker_code])
    cl.pass_time(1.0)
    assert cl.orders() == []
    cl.end_with("b", codes=[worker_code])
    cl.pass_time()
    assert ended(cl) == End(code)
    assert [event["signal"] for event in cl.recorded("stopping")] == [number.name]  # type: ignore[attr-defined]


def test_a_rank_that_was_asked_to_stop_stops_the_run(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.end_with("a", "b", codes=[75])
    cl.pass_time()
    assert ended(cl) == End(75)


def test_a_run_that_was_done_when_it_was_asked_to_stop_is_done(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.coordinator.stop(signal.SIGTERM, cl.now)
    cl.orders()
    cl.end_with("a", "b", codes=[0])
    cl.pass_time()
    assert ended(cl) == End(0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_fault_while_stopping_ends_the_run_and_says_that_nothing_was_saved(
    tmp_path: Path, number: int, code: int
) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.coordinator.stop(number, cl.now)
    cl.fail("a", killed("a"))
    cl.pass_time()
    assert cl.ordered("kill") == [("a", "kill"), ("b", "kill")]
    assert cl.coordinator.end == End(code, "not saved: rank 0 was killed by SIGKILL")


def test_a_mistake_that_comes_out_while_stopping_is_told(tmp_path: Path) -> None:
    cl = running(tmp_path, 1, "a")
    cl.coordinator.stop(signal.SIGTERM, cl.now)
    cl.fail("a", failed("a", "CheckpointError: the disk is full.", code=4))
    cl.pass_time()
    assert ended(cl) == End(4, "the disk is full.")


def test_workers_that_do_not_save_in_time_are_not_waited_for(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", stop_grace_s=30)
    cl.coordinator.stop(signal.SIGTERM, cl.now)
    cl.pass_time(20.0)
    cl.coordinator.stop(signal.SIGTERM, cl.now)  # asked again, there is not more time for it
    cl.pass_time(10.0)
    assert cl.coordinator.end is None
    cl.pass_time()
    assert ended(cl) == End(143, "not saved within launch.stop_grace_s")
    assert len(cl.recorded("stopping")) == 1


def test_a_stop_during_a_rollback_ends_the_run_where_it_was_rolled_back_to(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.coordinator.stop(signal.SIGTERM, cl.now)
    cl.end_with("a", "b", codes=[76])
    cl.pass_time()
    assert ended(cl) == End(75)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_between_two_attempts_there_is_nothing_to_save(
    tmp_path: Path, number: int, code: int
) -> None:
    cl = running(tmp_path, 1, "a")
    cl.fail("a", killed("a"))
    cl.pass_time()
    cl.orders()
    cl.report("a", "stop", number=int(number))
    assert ended(cl) == End(code)


def test_a_run_that_stops_does_not_grow(tmp_path: Path) -> None:
    cl = running(tmp_path, "1:2", "a")
    cl.coordinator.stop(signal.SIGTERM, cl.now)
    cl.orders()
    cl.come("b")
    cl.pass_time(5.0)
    assert cl.orders() == []
    cl.end_with("a", codes=[75])
    cl.pass_time()
    assert ended(cl) == End(75)


def test_a_stop_while_regrouping_is_a_stop(tmp_path: Path) -> None:
    cl = running(tmp_path, "1:2", "a")
    cl.come("b")
    cl.pass_time()
    assert cl.ordered() == [("a", "signal")]
    cl.coordinator.stop(signal.SIGTERM, cl.now)
    cl.end_with("a", codes=[75])
    cl.pass_time()
    assert ended(cl) == End(75)


@pytest.mark.parametrize("once_there", [False, True])
def test_too_few_nodes_end_the_run_after_join_s(tmp_path: Path, once_there: bool) -> None:
    cl = cluster(tmp_path, 2, join_s=50.0)
    cl.come("a")
    if once_there:
        cl.come("b")
        cl.start(step=5)
        cl.coordinator.left("b", "it closed the connection", cl.now)
        cl.pass_time()
        cl.ready("a")
    cl.pass_time(49.0)
    assert cl.coordinator.end is None
    cl.pass_time(2.0)
    end = ended(cl)
    assert end.exit_code == 5
    assert end.why.startswith("1 nodes were ready after launch.join_s 50")
    assert ("see " in end.why) == once_there, "there are no logs before a first attempt"


def test_consequences_alone_use_up_the_restarts_too(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", max_restarts=0)
    cl.fail("a", peer_gone("a"))
    cl.pass_time(SETTLE_S + 0.1)
    assert ended(cl).exit_code == 5


def test_the_loss_of_the_node_that_led_is_accounted_for_once(tmp_path: Path) -> None:
    cl = cluster(tmp_path, 1)
    lost = lost_node("old", "silent", 12, 4.0)
    cl.coordinator.inherit(lost)
    cl.coordinator.inherit(lost)
    fault = cl.recorded("fault")
    assert [(event["node"], event["step"], event["restarts_left"]) for event in fault] == [
        ("old", 12, 9)
    ]
    cl.come("a")
    assert cl.start(step=13) == ["a"]
    assert len(cl.recorded("recovered")) == 1


def test_a_leader_that_all_others_have_left_gives_way(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.coordinator.left("b", "it closed the connection", cl.now)
    cl.pass_time()
    cl.ready("a")
    cl.pass_time(GIVE_WAY_S - 1.0)
    assert not cl.coordinator.is_forsaken(cl.now)
    cl.pass_time(2.0)
    assert cl.coordinator.is_forsaken(cl.now)
    cl.come("b")
    assert not cl.coordinator.is_forsaken(cl.now)


def test_a_leader_that_waits_for_the_first_time_or_needs_nobody_does_not(tmp_path: Path) -> None:
    for nnodes in (1, 2):
        cl = cluster(tmp_path, nnodes)
        cl.coordinator.joined("a", "host-a", cl.now)
        cl.pass_time(2 * GIVE_WAY_S)
        assert not cl.coordinator.is_forsaken(cl.now)
    cl = running(tmp_path, 1, "a")
    cl.fail("a", killed("a"))
    cl.pass_time(2 * GIVE_WAY_S)
    assert not cl.coordinator.is_forsaken(cl.now)
