"""Laws of leading and following, over real sockets: who is let in, who stays, who hears the end."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import UsageError
from mpt.launch import lead, lease
from mpt.launch.ending import End
from mpt.launch.fault import Fault
from mpt.launch.follow import follow
from mpt.launch.lead import Leader
from mpt.launch.lease import Claim, Lease, read_claim, take
from mpt.launch.node import Node
from mpt.launch.place import Place
from mpt.launch.run import Run
from mpt.launch.signals import Signals, stop_signals
from mpt.launch.wire import Message, Wire, connect, listen
from mpt.recipe.launch import Hang, Launch
from mpt.rundir import LOCK
from tests.launch.stand_in import await_that, ranks_do


def new_run(run_dir: Path, name: str, identity: str = "recipe") -> tuple[Run, Node]:
    cfg = Launch(nproc=1, nnodes=2)
    node = Node(run_dir, name, nproc=1, environment={}, hang=Hang(), on_gpus=False)
    place = Place(name, "127.0.0.1")
    return Run(run_dir, cfg, identity, place, lambda: None, lambda: -1, lambda: False), node


class Led:
    """A node "a" that leads, in a thread, and waits for a second one."""

    def __init__(self, run_dir: Path, pool: ThreadPoolExecutor) -> None:
        self.run_dir = run_dir
        self.signals = Signals()
        self.lease: Lease = take(run_dir, "a")
        self.run, self.node = new_run(run_dir, "a")
        leader = Leader(self.run, self.node, self.lease, self.signals)
        self.end: Future[End | None] = pool.submit(leader.lead, None)
        self.claim: Claim = await_that(self._published)
        self.address = str(self.claim.address)

    def _published(self) -> Claim | None:
        claim = read_claim(self.run_dir)
        return claim if claim is not None and claim.address is not None else None

    def hello(self, **changes: Any) -> Message:
        named = {"kind": "hello", "nonce": self.claim.nonce, "node": "b"}
        return {**named, "identity": "recipe", "lost": None, **changes}

    def close(self) -> None:
        self.signals.pending.append(signal.SIGTERM)
        self.end.result(timeout=60)
        self.node.close()
        self.lease.release()


@pytest.fixture
def led(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Led]:
    monkeypatch.setattr(lead, "ALIVE_S", 0.05)
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with ThreadPoolExecutor() as pool:
        found = Led(tmp_path, pool)
        yield found
        found.close()


def answer(wire: Wire) -> Message:
    """Return the next message, or raise Closed."""
    message: Message = await_that(lambda: next(iter(wire.receive()), None))
    return message


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\xfe\n",
    b'{"kind": "hello"}\n',
    b'{"kind": "hello", "nonce": "wrong", "node": "b", "identity": "recipe"}\n',
    '{"kind": "hello", "nonce": "é"}\n'.encode(),
    b'{"kind": "hello", "nonce": "\\ud800"}\n',
    b'{"kind": "hello", "nonce": 7}\n',
    b'{"kind": "hello", "nonce": [[[]]]}\n',
    b'{"kind": "stop", "number": 15}\n',
]


def test_a_stranger_is_sent_away_and_harms_nobody(led: Led) -> None:
    host, port = led.address.split(":")
    knows_the_nonce = json.dumps(led.hello(kind="stop", number=15)).encode() + b"\n"
    for line in (*STRANGERS, knows_the_nonce):
        with socket.create_connection((host, int(port)), timeout=60) as stranger:
            stranger.sendall(line)
            assert stranger.recv(1) == b"", "it is told nothing"
        assert not led.end.done(), line
    with closing(connect(led.address)) as wire:
        wire.send(led.hello())
        assert answer(wire)["kind"] == "alive"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"node": "a"}, "a node called a is there already; give each its own --node NAME."),
        ({"identity": "other"}, "this node was started with another recipe than the one that"),
    ],
)
def test_a_node_that_does_not_fit_is_told_why(led: Led, changes: Message, why: str) -> None:
    with closing(connect(led.address)) as wire:
        wire.send(led.hello(**changes))
        refused = answer(wire)
        assert refused["kind"] == "refused"
        assert refused["why"].startswith(why)
    run, node = new_run(led.run_dir, changes.get("node", "b"), changes.get("identity", "recipe"))
    try:
        with pytest.raises(UsageError, match="^" + why[:20]):
            follow(run, node, led.claim, led.address, None, Signals())
    finally:
        node.close()


def test_a_leader_whose_claim_is_another_nodes_leads_no_more(led: Led) -> None:
    other = replace(led.claim, nonce="another", node="b", pid=1)
    (led.run_dir / LOCK).write_text(json.dumps(asdict(other)))
    assert led.end.result(timeout=60) is None
    assert read_claim(led.run_dir) == other


def test_two_nodes_train_and_both_hear_the_end(
    led: Led, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks_do(
        "assert os.environ['WORLD_SIZE'] == '2'; say(os.environ['GROUP_RANK'])",
        tmp_path,
        monkeypatch,
    )
    run, node = new_run(tmp_path, "b")
    try:
        assert follow(run, node, led.claim, led.address, None, Signals()) == End(0)
        assert led.end.result(timeout=60) == End(0)
    finally:
        node.close()
    assert [(tmp_path / f"rank-{rank}.said").read_text() for rank in (0, 1)] == ['"0"', '"1"']


Script = Callable[[Wire], None]


def led_by(script: Script, run_dir: Path) -> End | Fault | None:
    """Return what following one that does as the script says comes to."""
    with listen("127.0.0.1", 0) as server, ThreadPoolExecutor() as pool:
        server.setblocking(True)

        def lead() -> None:
            connection, _ = server.accept()
            with closing(Wire(connection)) as wire:
                script(wire)

        done = pool.submit(lead)
        run, node = new_run(run_dir, "b")
        claim = Claim(1, "elsewhere", "a", 1, "nonce")
        try:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            with stop_signals() as signals:
                return follow(run, node, claim, address, None, signals)
        finally:
            node.close()
            done.result(timeout=60)


def test_a_request_to_stop_is_passed_on_and_lost_with_the_one_that_led(tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        assert answer(wire)["kind"] == "hello"
        wire.send({"kind": "alive"})
        os.kill(os.getpid(), signal.SIGTERM)
        heard: list[Message] = []

        def stop_was_heard() -> bool:
            heard.extend(wire.receive())
            return "stop" in [message["kind"] for message in heard]

        await_that(stop_was_heard)

    # With no worker here there is nothing to lose: the supervisor's loop ends with 75.
    assert isinstance(led_by(script, tmp_path), Fault)


def test_the_loss_of_the_one_that_led_is_a_fault_of_its_node(tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        assert answer(wire)["kind"] == "hello"
        wire.send({"kind": "alive"})

    lost = led_by(script, tmp_path)
    assert isinstance(lost, Fault)
    assert (lost.kind, lost.node) == ("node_lost", "a")


def test_one_that_never_spoke_is_no_loss(tmp_path: Path) -> None:
    assert led_by(lambda _: None, tmp_path) is None


def test_a_hangup_is_ignored_under_nohup_and_a_stop_elsewhere() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.take() == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.take() == [signal.SIGHUP]
            assert signals.take() == []
            assert signals.latest == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_interrupt_means_now() -> None:
    with stop_signals() as signals:
        for now in (False, True):
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.now == now
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.take() == [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
