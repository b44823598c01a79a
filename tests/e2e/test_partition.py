"""Nodes in network namespaces of their own: cables are pulled, also that of the node that leads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Small, await_that, lines
from tests.e2e.test_faults import events
from tests.e2e.test_resume import clean, final_weights  # noqa: F401 - a fixture

NAMES = ("a", "b", "c")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[str]:
    """Three namespaces on one bridge; the fixture's value begins their names."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    mine = f"mpt{os.getpid() % 10_000}"
    try:
        ip("link", "add", f"{mine}br", "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr}")
    try:
        ip("link", "set", f"{mine}br", "up")
        for i, name in enumerate(NAMES):
            space = f"{mine}{name}"
            ip("netns", "add", space)
            ip("link", "add", f"{space}v", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"{space}v", "master", f"{mine}br", "up")
            ip("-n", space, "addr", "add", f"10.77.0.{i + 2}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield mine
    finally:
        for name in NAMES:
            subprocess.run(["ip", "link", "del", f"{mine}{name}v"], capture_output=True)
            subprocess.run(["ip", "netns", "del", f"{mine}{name}"], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{mine}br"], capture_output=True)


def test_a_node_that_leads_and_is_cut_off_lets_another_lead(
    network: str,
    small: Small,
    clean: Path,  # noqa: F811
    tmp_path: Path,
    children: list[subprocess.Popen[str]],
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["train", str(small.recipe), "--run-dir", str(run_dir), "--nproc", "1"]
    arguments += ["--nnodes", "2", "--rdzv", "10.77.0.2:29400", "checkpoint.every_steps=1"]
    slow = {"MPT_INJECT": json.dumps({"slow_rank": 0, "slow_s": 0.5})}
    nodes = {}
    for name in NAMES:
        command = ["ip", "netns", "exec", f"{network}{name}"]
        command += small.command(*arguments, "--node", name)
        nodes[name] = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=small.root, env={**os.environ, **slow}
        )
        children.append(nodes[name])
    await_that(lambda: len(lines(run_dir / "metrics.jsonl")) > 1, nodes["a"])
    assert events(run_dir, "attempt_started")[0]["nodes"][0] == "a"
    ip("-n", f"{network}a", "link", "set", "eth0", "down")
    await_that(lambda: len(events(run_dir, "attempt_started")) > 1, nodes["b"])
    assert set(events(run_dir, "attempt_started")[1]["nodes"]) == {"b", "c"}
    for name in ("b", "c"):
        _, said = nodes[name].communicate(timeout=120)
        assert nodes[name].returncode == 0, said
    assert final_weights(run_dir) == final_weights(clean)
    lost = [fault["node"] for fault in events(run_dir, "fault")]
    assert "a" in lost, "the others account for it"
