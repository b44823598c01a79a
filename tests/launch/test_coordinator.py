"""Laws of the coordinator on a played cluster: who trains, and what becomes of a fault."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mpt.launch.coordinator import NODE_SILENT_S, SETTLE_S
from mpt.launch.pulse import Phase
from mpt.recipe.launch import Hang, Launch
from tests.launch.cluster import Cluster, cluster, failed, killed, peer_gone, running, state


def two_failures(node: str) -> list[dict[str, Any]]:
    time = datetime.now(UTC).isoformat()
    return [{"event": "fault", "attributable": True, "node": node, "time": time}] * 2


def test_an_attempt_begins_when_enough_nodes_are_ready(tmp_path: Path) -> None:
    cl = cluster(tmp_path, 2)
    cl.come("a")
    cl.pass_time(60.0)
    assert cl.orders() == []
    cl.come("b")
    cl.pass_time()
    orders = cl.orders()
    assert [(name, order["kind"]) for name, order in orders] == [("a", "start"), ("b", "start")]
    parts = [order["assignment"] for _, order in orders]
    assert [part["first_rank"] for part in parts] == [0, 2]
    assert {(p["attempt"], p["world_size"], p["store_host"]) for p in parts} == {(0, 4, "host-a")}
    assert cl.begin(orders) == ["a", "b"]
    started = {"attempt": 0, "world_size": 4, "nodes": ["a", "b"], "pids": [1000, 1001, 1002, 1003]}
    assert cl.recorded("attempt_started") == [{"event": "attempt_started", **started}]


def test_after_a_fault_all_are_killed_and_none_begins_before_all_are_ready(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.fail("b", killed("b", rank=3, step=5))
    cl.pass_time()
    assert cl.ordered() == [("a", "kill"), ("b", "kill")]
    cl.ready("b")
    cl.pass_time(20.0)
    assert cl.orders() == [], "there are still workers on a"
    cl.ready("a")
    cl.pass_time()
    orders = cl.orders()
    assert [(name, order["kind"]) for name, order in orders] == [("a", "start"), ("b", "start")]
    assert {(o["assignment"]["attempt"], o["keep_memory"]) for _, o in orders} == {(1, True)}
    fault = cl.recorded("fault")[0]
    assert (fault["attempt"], fault["kind"], fault["node"], fault["rank"]) == (0, "killed", "b", 3)
    assert (fault["restarts_left"], fault["attributable"]) == (9, True)
    assert "restarting (9 restarts left)." in cl.said[-1]


def test_what_a_restart_took_is_recorded_once_from_the_fault_to_the_first_step(
    tmp_path: Path,
) -> None:
    cl = running(tmp_path, 1, "a")
    assert cl.recorded("recovered") == [], "a first start is no recovery"
    cl.fail("a", killed("a", step=5))
    cl.pass_time()
    cl.ready("a")
    cl.start()
    cl.pass_time(3.0)
    cl.report("a", "running", step=6)
    cl.report("a", "running", step=7)
    took = cl.recorded("recovered")
    assert [(event["attempt"], event["step"]) for event in took] == [(1, 6)]
    assert took[0]["restart_s"] == pytest.approx(3.2, abs=0.01)


def test_a_silent_node_is_lost_and_a_spare_takes_its_place(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", "spare")
    cl.silent.add("a")
    cl.pass_time(NODE_SILENT_S)
    assert cl.ordered() == []
    cl.pass_time(0.2)
    assert cl.ordered() == [("a", "kill"), ("b", "kill")], "a may wake, and must not go on"
    assert cl.coordinator.members == {"b", "spare"}
    cl.ready("b")
    assert cl.start() == ["spare", "b"], "b keeps its ranks"
    fault = cl.recorded("fault")[0]
    assert (fault["kind"], fault["node"], fault["step"]) == ("node_lost", "a", 5)
    assert NODE_SILENT_S < fault["detected_s"] <= 5.0, "R2"


def test_a_spare_that_goes_is_no_fault(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", "spare")
    cl.coordinator.left("spare", "it closed the connection", cl.now)
    cl.pass_time(5.0)
    assert cl.orders() == []
    assert cl.recorded("fault") == []
    assert cl.said[-1] == "node spare left: it closed the connection."


def test_without_a_spare_a_fixed_number_of_nodes_is_waited_for(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.coordinator.left("b", "it closed the connection", cl.now)
    cl.pass_time()
    cl.ready("a")
    cl.pass_time(60.0)
    assert cl.ordered("start") == []
    cl.come("b")
    assert cl.start() == ["a", "b"]


def test_with_a_range_fewer_go_on_and_a_node_that_comes_back_is_taken_in(tmp_path: Path) -> None:
    cl = running(tmp_path, "1:2", "a", "b")
    cl.coordinator.left("b", "it closed the connection", cl.now)
    cl.pass_time()
    cl.ready("a")
    assert cl.start() == ["a"]
    cl.come("b")
    cl.pass_time(60.0)
    assert cl.ordered() == [], "not before there is something to save"
    cl.report("a", "running", step=6)
    cl.pass_time()
    assert cl.orders() == [("a", {"kind": "signal", "number": signal.SIGUSR1})]
    cl.pass_time(60.0)
    assert cl.ordered() == [], "once is enough"
    cl.end_with("a", codes=[75])
    cl.pass_time()
    assert cl.start(step=7) == ["a", "b"]
    assert cl.recorded("fault")[0]["kind"] == "node_lost"
    assert len(cl.recorded("fault")) == 1
    assert cl.coordinator.end is None


def test_a_node_that_failed_twice_is_not_taken_in_again(tmp_path: Path) -> None:
    cl = Cluster(tmp_path, Launch(nproc=2, nnodes="1:2"), past_events=two_failures("b"))
    cl.come("a", "b")
    assert cl.start(step=5) == ["a"]
    cl.pass_time(60.0)
    assert cl.orders() == [], "else it would be taken in, and left out, for ever"


def test_a_node_that_is_only_done_first_is_no_node_to_grow_by(tmp_path: Path) -> None:
    cl = running(tmp_path, "1:3", "a", "b")
    cl.end_with("a", codes=[0])
    cl.pass_time(1.0)
    assert cl.ordered() == []
    cl.end_with("b", codes=[0])
    cl.pass_time()
    assert cl.ordered() == [("a", "end"), ("b", "end")]


def test_a_fault_while_regrouping_ends_the_regrouping(tmp_path: Path) -> None:
    cl = running(tmp_path, "1:2", "a")
    cl.come("b")
    cl.pass_time()
    assert cl.ordered() == [("a", "signal")]
    cl.fail("a", killed("a", step=6))
    cl.pass_time()
    cl.ready("a")
    assert cl.start(step=7) == ["a", "b"]
    cl.end_with("a", "b", codes=[75])  # as after a SIGTERM to one of its ranks
    cl.pass_time()
    assert cl.coordinator.end is not None
    assert cl.coordinator.end.exit_code == 75


def test_consequences_wait_for_their_cause_and_not_for_long(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.fail("a", peer_gone("a"))
    cl.pass_time(SETTLE_S / 2)
    assert cl.ordered() == []
    cl.coordinator.left("b", "it closed the connection", cl.now)
    cl.pass_time()
    assert cl.ordered() == [("a", "kill"), ("b", "kill")]
    assert cl.recorded("fault")[0]["kind"] == "node_lost"

    alone = running(tmp_path, 2, "a", "b")
    alone.fail("a", peer_gone("a"))
    alone.pass_time(SETTLE_S + 0.1)
    assert alone.ordered("kill") == [("a", "kill"), ("b", "kill")]
    assert not alone.recorded("fault")[0]["attributable"]


def test_on_one_node_nothing_is_waited_for(tmp_path: Path) -> None:
    cl = running(tmp_path, 1, "a")
    cl.fail("a", peer_gone("a"))
    cl.pass_time()
    assert cl.ordered() == [("a", "kill")]


def test_a_node_that_failed_twice_is_left_out_when_another_is_there(tmp_path: Path) -> None:
    for spares, wanted in ((["spare"], ["a", "spare"]), ([], ["a", "b"])):
        cl = Cluster(tmp_path, Launch(nproc=2, nnodes=2), past_events=two_failures("b"))
        cl.come("a", "b", *spares)
        assert cl.start() == wanted
        assert ("node b failed too often lately: not used." in cl.said) == bool(spares)


def test_failures_of_this_launch_count_as_those_of_the_last(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", "spare")
    for step in (5, 6):
        cl.fail("b", killed("b", rank=2, step=step))
        cl.pass_time()
        cl.ready("a", "b")
        nodes = cl.start(step=step + 1)
    assert nodes == ["a", "spare"]


@pytest.mark.parametrize(
    "report",
    [
        {"kind": "faults", "faults": [{"kind": "killed", "node": "spare", "why": "no reason"}]},
        {"kind": "ended", "codes": [2]},
        {"kind": "hung"},
        {"kind": "stacks", "ranks": []},
        {"kind": "started", "pids": [1]},
        {"kind": "running", "step": 9},
        {"kind": "something new"},
    ],
)
@pytest.mark.parametrize("name", ["spare", "stranger"])
def test_who_has_no_part_in_the_attempt_has_no_say_in_it(
    tmp_path: Path, name: str, report: dict[str, Any]
) -> None:
    cl = running(tmp_path, 1, "a", "spare")
    before = len(cl.events)
    cl.coordinator.heard(name, report, cl.now)
    cl.pass_time(10.0)
    assert cl.orders() == []
    assert len(cl.events) == before
    assert cl.coordinator.end is None


def test_a_hang_is_explained_by_all_ranks_before_they_are_killed(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", hang=Hang(min_s=60.0))
    cl.report("b", "hung")
    cl.report("a", "hung")
    assert [(name, o["kind"], o["attempt"]) for name, o in cl.orders()] == [
        ("a", "dump", 0),
        ("b", "dump", 0),
    ]
    cl.report("b", "stacks", ranks=[state("b", rank, Phase.STEP, 61.0) for rank in (2, 3)])
    cl.pass_time(1.0)
    assert cl.orders() == [], "a has not answered yet"
    cl.report("a", "stacks", ranks=[state("a", rank, Phase.STEP, 62.0) for rank in (0, 1)])
    cl.pass_time()
    assert cl.ordered() == [("a", "kill"), ("b", "kill")]
    fault = cl.recorded("fault")[0]
    assert (fault["kind"], fault["rank"], fault["detected_s"]) == ("hang", 0, 62.0)
    assert "ranks 0-3 on a, b gave no stack" in fault["why"]


def test_a_node_that_cannot_say_where_its_ranks_are_is_not_waited_for(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b")
    cl.report("a", "hung")
    cl.report("a", "stacks", ranks=[state("a", rank, Phase.STEP, 61.0) for rank in (0, 1)])
    cl.pass_time(6.0)
    assert cl.ordered("kill") == [("a", "kill"), ("b", "kill")]


def test_ranks_that_wait_for_one_with_more_time_do_not_hang(tmp_path: Path) -> None:
    cl = running(tmp_path, 2, "a", "b", hang=Hang(min_s=60.0, save_s=900.0))
    for _ in range(2):
        cl.report("b", "hung")
        assert cl.ordered() == [("a", "dump"), ("b", "dump")]
        cl.report(
            "a", "stacks", ranks=[state("a", 0, Phase.SAVE, 62.0), state("a", 1, Phase.STEP, 61.0)]
        )
        cl.report("b", "stacks", ranks=[state("b", rank, Phase.STEP, 61.0) for rank in (2, 3)])
        cl.pass_time(30.0)
        assert cl.orders() == []
        assert cl.recorded("fault") == []


def test_what_a_node_said_of_an_earlier_silence_does_not_explain_a_later_one(
    tmp_path: Path,
) -> None:
    cl = running(tmp_path, 2, "a", "b")
    saving = [state("a", rank, Phase.SAVE, 62.0) for rank in (0, 1)]
    waiting = [state("b", rank, Phase.STEP, 61.0) for rank in (2, 3)]
    cl.report("b", "hung")
    cl.report("a", "stacks", ranks=saving)
    cl.report("b", "stacks", ranks=waiting)
    cl.pass_time()
    cl.report("a", "stacks", ranks=saving)  # too late
    cl.report("b", "hung")
    cl.report("b", "stacks", ranks=[state("b", rank, Phase.STEP, 91.0, step=6) for rank in (2, 3)])
    cl.pass_time(1.0)
    assert cl.ordered("kill") == [], "a has yet to say where it is now"


def test_a_fault_before_the_stacks_are_in_is_what_counts(tmp_path: Path) -> None:
    cl = running(tmp_path, 1, "a")
    cl.report("a", "hung")
    cl.fail("a", killed("a"))
    cl.pass_time()
    assert cl.recorded("fault")[0]["kind"] == "killed"


def test_what_failed_before_it_began_is_tried_again(tmp_path: Path) -> None:
    cl = cluster(tmp_path, 1)
    cl.come("a")
    cl.pass_time()
    cl.orders()
    cl.fail("a", failed("a", "OSError: [Errno 11] Resource temporarily unavailable"))
    cl.pass_time()
    assert cl.ordered() == [("a", "kill")]
    cl.ready("a")
    assert cl.start() == ["a"]
