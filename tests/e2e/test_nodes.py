"""Several nodes: supervisors side by side, of which any may be lost, the one that leads too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Small, await_that, lines
from tests.e2e.test_faults import events
from tests.e2e.test_resume import (  # noqa: F401 - two are fixtures
    LOSS_TOLERANCE,
    clean,
    final_weights,
    losses,
    undropped,
)

SLOW = {"MPT_INJECT": json.dumps({"slow_rank": 0, "slow_s": 0.2})}
"""Long enough steps for something to happen in them."""


class Nodes:
    """`mpt train` on nodes of this machine, each with a name."""

    def __init__(
        self,
        small: Small,
        run_dir: Path,
        children: list[subprocess.Popen[str]],
        nnodes: str,
        *changes: str,
    ) -> None:
        self.run_dir = run_dir
        self._small, self._children = small, children
        self._arguments = ["train", str(small.recipe), "--run-dir", str(run_dir), *changes]
        self._arguments += ["--nproc", "1", "--nnodes", nnodes, "--rdzv", "127.0.0.1:0"]
        self.of: dict[str, subprocess.Popen[str]] = {}

    def start(self, *names: str) -> None:
        for name in names:
            process = self._small.start(*self._arguments, "--node", name, environment=SLOW)
            self._children.append(process)
            self.of[name] = process

    def leader(self) -> str:
        """The node that leads, once one does."""

        def claim() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = json.loads((self.run_dir / "lock").read_text())
            except (OSError, ValueError):
                return None
            return found if found["address"] else None

        return str(await_that(claim, next(iter(self.of.values())))["node"])

    def attempt(self, number: int) -> dict[str, Any]:
        """The start of an attempt, once it has taken a step."""

        def started() -> dict[str, Any] | None:
            steps = [r for r in lines(self.run_dir / "metrics.jsonl") if "loss" in r]
            found = [e for e in events(self.run_dir, "attempt_started") if e["attempt"] == number]
            return found[0] if found and any(r["attempt"] == number for r in steps) else None

        alive = next(process for process in self.of.values() if process.poll() is None)
        found: dict[str, Any] = await_that(started, alive)
        return found

    def kill(self, name: str) -> None:
        self.of[name].kill()
        self.of.pop(name).communicate()

    def end(self, code: int = 0) -> str:
        """Wait for all; return what they said."""
        said = ""
        for process in self.of.values():
            _, text = process.communicate(timeout=240)
            assert process.returncode == code, text
            assert "Traceback" not in text, text
            said += text
        return said


@pytest.fixture
def nodes(
    small: Small, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> Callable[..., Nodes]:
    return lambda nnodes, *changes: Nodes(small, tmp_path / "run", children, nnodes, *changes)


def test_a_lost_node_and_then_a_lost_leader_change_no_bit(
    nodes: Callable[..., Nodes],
    clean: Path,  # noqa: F811
) -> None:
    group = nodes("2", "checkpoint.every_steps=1")
    group.start("a")
    assert group.leader() == "a"
    group.start("b")
    assert set(group.attempt(0)["nodes"]) == {"a", "b"}
    group.start("c")  # a spare
    group.kill("b")
    assert set(group.attempt(1)["nodes"]) == {"a", "c"}
    group.start("d")
    group.kill("a")
    assert set(group.attempt(2)["nodes"]) == {"c", "d"}
    group.end()
    lost = events(group.run_dir, "fault")
    assert [(fault["kind"], fault["node"]) for fault in lost] == [
        ("node_lost", "b"),
        ("node_lost", "a"),
    ]
    assert events(group.run_dir, "recovered")
    assert final_weights(group.run_dir) == final_weights(clean)


def test_with_fewer_nodes_a_run_goes_on_and_takes_a_node_in_again(
    nodes: Callable[..., Nodes],
    undropped: Path,  # noqa: F811
) -> None:
    group = nodes("1:2", "checkpoint.every_steps=1", "model.resid_pdrop=0.0")
    group.start("a", "b")
    assert group.attempt(0)["world_size"] == 2
    other = "b" if group.leader() == "a" else "a"
    group.kill(other)
    assert group.attempt(1)["world_size"] == 1
    group.start(other)
    assert group.attempt(2)["world_size"] == 2
    group.end()
    ours, theirs = losses(group.run_dir), losses(undropped)
    assert sorted(ours) == sorted(theirs)
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=LOSS_TOLERANCE), step


def test_a_node_that_was_asleep_is_replaced_and_what_it_still_does_does_not_count(
    nodes: Callable[..., Nodes],
    clean: Path,  # noqa: F811
) -> None:
    group = nodes("2", "checkpoint.every_steps=1")
    group.start("a", "b", "c")
    first = group.attempt(0)
    leader = group.leader()
    (sleeper,) = set(first["nodes"]) - {leader} or {leader}
    pid = first["pids"][first["nodes"].index(sleeper)]
    group.of[sleeper].send_signal(signal.SIGSTOP)
    os.kill(pid, signal.SIGSTOP)
    second = group.attempt(1)
    assert sleeper not in second["nodes"]
    (fault,) = events(group.run_dir, "fault")
    assert (fault["kind"], fault["node"]) == ("node_lost", sleeper)
    os.kill(pid, signal.SIGCONT)
    group.of[sleeper].send_signal(signal.SIGCONT)
    group.end()
    newest = [r["attempt"] for r in lines(group.run_dir / "metrics.jsonl") if "loss" in r]
    assert newest == sorted(newest), "the old group wrote after the new one had begun"
    assert final_weights(group.run_dir) == final_weights(clean)


def test_a_node_whose_ranks_keep_dying_is_not_used_again_while_there_is_another(
    nodes: Callable[..., Nodes],
    clean: Path,  # noqa: F811
) -> None:
    group = nodes("2", "checkpoint.every_steps=1")
    group.start("a")
    group.leader()
    group.start("b")
    for attempt in range(2):
        started = group.attempt(attempt)
        assert set(started["nodes"]) == {"a", "b"}
        if attempt == 0:
            group.start("c")  # in time to be there when it is needed
        os.kill(started["pids"][started["nodes"].index("b")], signal.SIGKILL)
    assert set(group.attempt(2)["nodes"]) == {"a", "c"}
    said = group.end()
    assert "node b failed too often lately: not used" in said
    assert final_weights(group.run_dir) == final_weights(clean)


def test_a_signal_to_any_node_saves_and_stops_all_of_them(
    nodes: Callable[..., Nodes],
    clean: Path,  # noqa: F811
) -> None:
    group = nodes("2", "checkpoint.every_steps=1000")
    group.start("a", "b", "c")
    started = group.attempt(0)
    group.of[started["nodes"][-1]].send_signal(signal.SIGTERM)
    group.end(code=75)
    (stopped,) = events(group.run_dir, "stopped")
    assert [e["step"] for e in events(group.run_dir, "checkpoint")] == [stopped["step"]]
    group.of.clear()
    group.start("a", "b")
    group.end()
    assert final_weights(group.run_dir) == final_weights(clean)


def test_nodes_with_another_recipe_or_the_same_name_are_refused(
    nodes: Callable[..., Nodes], small: Small
) -> None:
    group = nodes("2")
    group.start("a")
    group.leader()
    rest = ["--run-dir", str(group.run_dir), "--nproc", "1", "--nnodes", "2"]
    said = small.mpt("train", small.recipe, *rest, "--node", "a", code=2).stderr
    assert "a node called a is there already" in said
    rest += ["optimizer.lr=1.0", "--node", "x"]
    said = small.mpt("train", small.recipe, *rest, code=2).stderr
    assert "another recipe" in said
    alone = ["--run-dir", str(group.run_dir), "--node", "y"]
    assert "is being trained by" in small.mpt("train", small.recipe, *alone, code=2).stderr
    group.of["a"].send_signal(signal.SIGINT)
    group.end(code=130)
