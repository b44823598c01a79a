"""Laws of the lease, on real processes: one launch at a time has a run, whatever becomes of it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from mpt.errors import UsageError
from mpt.launch import lease
from mpt.launch.lease import Claim, Rival, holder, take
from mpt.rundir import LOCK

RENEW_S, LEASE_S = 0.02, 1.0
PATIENCE_S = 60.0

LAUNCH = textwrap.dedent("""
    import sys
    from pathlib import Path
    from mpt.errors import UsageError
    from mpt.launch import lease
    lease.RENEW_S, lease.LEASE_S = map(float, sys.argv[3:5])
    sys.stdin.readline()
    try:
        mine = lease.take(Path(sys.argv[1]), sys.argv[2])
    except UsageError as error:
        print(error, flush=True)
        sys.exit(2)
    print("taken", flush=True)
    for _ in sys.stdin:
        print("lost" if mine.lost else "held", flush=True)
    mine.release()
""")

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", RENEW_S)
    monkeypatch.setattr(lease, "LEASE_S", LEASE_S)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts processes that want the run; the first line that one is told lets it try."""
    started: list[subprocess.Popen[str]] = []

    def start(node: str, renew_s: float = RENEW_S) -> subprocess.Popen[str]:
        numbers = (str(renew_s), str(LEASE_S))
        command = [sys.executable, "-c", LAUNCH, str(tmp_path), node, *numbers]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str]) -> str:
    """Return what a launch says next."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def name(process: subprocess.Popen[str]) -> str:
    return f"{process.pid}@{socket.gethostname()}"


def await_that(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def stop_outside_the_lock(process: subprocess.Popen[str], path: Path) -> None:
    """Stop a process as a paused machine does; not within the microseconds that it has the lock."""
    while True:
        process.send_signal(signal.SIGSTOP)
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                process.send_signal(signal.SIGCONT)
                continue
            return


@pytest.mark.parametrize("node", ["a", "b"])
def test_a_second_launch_is_refused_by_the_name_of_the_first(
    launch: Launch, tmp_path: Path, node: str
) -> None:
    first = launch("a")
    assert ask(first) == "taken"
    assert holder(tmp_path) == name(first)
    with pytest.raises(UsageError, match=f"is being trained by {name(first)}"):
        take(tmp_path, node)
    second = launch(node)
    assert name(first) in ask(second)
    assert ask(first) == "held"


def test_a_run_is_free_at_once_when_its_process_is_killed_on_the_same_node(
    launch: Launch, tmp_path: Path
) -> None:
    first = launch("a", renew_s=1000.0)
    assert ask(first) == "taken"
    rival = Rival(tmp_path, "a")
    assert not rival.look(), "it is alive, though it does not renew"
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    assert rival.look()
    assert holder(tmp_path) is None, "whatever its node was called"
    take(tmp_path, "a").release()


def test_a_pid_that_was_given_to_another_process_holds_nothing(tmp_path: Path) -> None:
    mine = take(tmp_path, "a")
    before = Claim(**{**asdict(mine.claim), "started": mine.claim.started - 1})
    mine.release()
    (tmp_path / LOCK).write_text(json.dumps(asdict(before)))
    assert holder(tmp_path) is None
    assert Rival(tmp_path, "a").look()


def test_a_claim_that_another_node_does_not_renew_goes_stale(
    launch: Launch, tmp_path: Path
) -> None:
    first = launch("b")
    assert ask(first) == "taken"
    first.kill()
    first.wait()
    before = time.monotonic()
    rival = Rival(tmp_path, "a")
    assert not rival.look(), "nobody here can know yet that its process is gone"
    mine = take(tmp_path, "a")
    assert time.monotonic() - before >= LEASE_S
    assert not mine.lost
    mine.release()


def test_a_look_that_fell_asleep_does_not_take_the_claim_it_saw_before_for_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 1000.0)
    mine = take(tmp_path, "b")
    rival = Rival(tmp_path, "a")
    assert not rival.look()
    stat = os.stat

    def sleepy_stat(path: Path) -> os.stat_result:
        found = stat(path)
        time.sleep(1.5 * LEASE_S)  # stopped just here, while the holder goes on
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", sleepy_stat)
        assert not rival.look()
    mine.release()


def test_of_two_that_see_a_run_free_the_first_takes_it(tmp_path: Path) -> None:
    rivals = [Rival(tmp_path, "a"), Rival(tmp_path, "b")]
    assert all(rival.look() for rival in rivals)
    mine, nothing = (rival.take() for rival in rivals)
    assert mine is not None
    assert nothing is None
    mine.release()


def test_of_four_that_race_for_a_stale_claim_one_wins(launch: Launch, tmp_path: Path) -> None:
    gone = launch("gone")
    assert ask(gone) == "taken"
    gone.kill()
    racers = [launch(node) for node in "abcd"]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
    assert said.count("taken") == 1
    winner = racers[said.index("taken")]
    assert all(name(winner) in words for words in said if words != "taken")
    assert holder(tmp_path) == name(winner)
    assert ask(winner) == "held"


def test_a_holder_that_slept_while_another_took_over_sees_that_it_has_lost(
    launch: Launch, tmp_path: Path
) -> None:
    sleeper = launch("b")
    assert ask(sleeper) == "taken"
    stop_outside_the_lock(sleeper, tmp_path / LOCK)
    mine = take(tmp_path, "a")
    sleeper.send_signal(signal.SIGCONT)
    await_that(lambda: ask(sleeper) == "lost")
    sleeper.communicate()  # it lets go, of what is not its own any more
    assert holder(tmp_path) == mine.claim.holder
    assert not mine.lost
    mine.release()


def test_a_launch_that_sleeps_with_the_lock_does_not_keep_the_holder_from_renewing(
    tmp_path: Path,
) -> None:
    mine = take(tmp_path, "a")
    with (tmp_path / LOCK).open() as sleeper:
        fcntl.flock(sleeper, fcntl.LOCK_EX)
        os.utime(tmp_path / LOCK, (0, 0))
        await_that(lambda: os.stat(tmp_path / LOCK).st_mtime_ns > 0)
    mine.release()


def test_a_run_that_was_let_go_of_is_taken_at_once_by_any_node(tmp_path: Path) -> None:
    mine = take(tmp_path, "b")
    mine.publish(address="10.0.0.1:29400", ready=True)
    rival = Rival(tmp_path, "a")
    await_that(lambda: not rival.look() and rival.renewed)
    mine.release()
    assert holder(tmp_path) is None
    assert rival.look()
    assert not rival.renewed
    next_one = rival.take()
    assert next_one is not None
    assert next_one.claim.address is None, "nobody can join before it says where"
    assert not next_one.claim.ready, "what it prepares is not ready yet"
    next_one.release()


def test_what_a_holder_publishes_is_what_others_read(tmp_path: Path) -> None:
    mine = take(tmp_path, "b")
    mine.publish(address="10.0.0.1:29400", ready=True)
    rival = Rival(tmp_path, "a")
    rival.look()
    assert rival.claim == mine.claim
    assert (mine.claim.address, mine.claim.ready) == ("10.0.0.1:29400", True)
    mine.release()


def test_a_holder_that_has_lost_overwrites_nothing(tmp_path: Path) -> None:
    mine = take(tmp_path, "b")
    other = Claim(1, "elsewhere", "c", 1, "another nonce")
    (tmp_path / LOCK).write_text(json.dumps(asdict(other)))
    mine.publish(address="10.0.0.1:29400", ready=True)
    assert mine.lost
    mine.release()
    assert holder(tmp_path) == "1@elsewhere"


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"pid": 1}', b"4711@node-1\n"],
)
def test_what_is_no_claim_holds_nothing(tmp_path: Path, text: bytes) -> None:
    (tmp_path / LOCK).write_bytes(text)
    assert holder(tmp_path) is None
    take(tmp_path, "a").release()


def test_a_claim_that_was_cut_off_holds_nothing(tmp_path: Path) -> None:
    whole = json.dumps(asdict(Claim(1, "elsewhere", "b", 1, "nonce"))).encode()
    for length in range(len(whole) + 1):
        (tmp_path / LOCK).write_bytes(whole[:length])
        assert holder(tmp_path) == ("1@elsewhere" if length == len(whole) else None)


def test_a_look_at_who_has_a_run_leaves_nothing_behind(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_the_nonce_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        mine = take(tmp_path, "a")
    finally:
        os.umask(before)
    assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600
    mine.release()


def test_trouble_with_the_file_system_loses_no_lease(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    mine = take(run_dir, "a")
    shutil.rmtree(run_dir)
    time.sleep(10 * RENEW_S)  # nothing tells of a renewal that failed
    assert not mine.lost
    run_dir.mkdir()
    text = json.dumps(asdict(mine.claim))
    (run_dir / LOCK).write_text(text[:-9])  # as a reader finds it that comes while it is written
    os.utime(run_dir / LOCK, (0, 0))
    await_that(lambda: os.stat(run_dir / LOCK).st_mtime_ns > 0)
    (run_dir / LOCK).write_text(text)
    os.utime(run_dir / LOCK, (0, 0))
    await_that(lambda: os.stat(run_dir / LOCK).st_mtime_ns > 0)  # it renews as before
    assert not mine.lost
    shutil.rmtree(run_dir)
    mine.release()
