"""Real processes that hang in one way or another say where they are, and it is put in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mpt.launch.diagnosis import diagnose
from mpt.launch.hang import RankState, rank_states
from mpt.launch.pulse import PULSE_FD, Phase, Pulse
from mpt.launch.stacks import STACK_SIGNAL, parse_stacks, process_state, stack_file
from mpt.recipe.launch import Hang

CFG = Hang()
PATIENCE_S = 60

SCRIPT = '''\
"""Stands where one of our own files does, and hangs as it is told."""

import ctypes
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mpt.launch.pulse import Phase, Pulse
from mpt.launch.stacks import answer_stack_signal


def endless():
    while True: pass  # on one line, so that it is always found on this one


def hold_the_lock():
    while True:
        ctypes.PyDLL(None).pause()


def read():
    ThreadPoolExecutor(1).submit(endless).result()


def wait():
    all_reduce()


def meet():
    """Enter a group of three: what comes then is about one collective."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    from mpt.dist import sum_over_ranks

    return partial(sum_over_ranks, torch.zeros(3))


stacks, store, hang = sys.argv[1:]
all_reduce = meet() if store else None
answer_stack_signal(Path(stacks))
pulse = Pulse.inherited()
pulse.beat(Phase.STEP, 16)
globals()[hang]()
'''


@dataclass
class Crew:
    """Real processes that hang, and the pulses that they were given."""

    directory: Path
    logs: Path
    """Where the stacks go, as an attempt's do."""
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    pulses: dict[int, Pulse] = field(default_factory=dict)

    def start(self, rank: int, hang: str, store: str = "") -> None:
        script = self.directory / "mpt" / "train" / "hangs.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPT, encoding="utf-8")
        stacks = stack_file(self.logs, rank)
        self.run(rank, [sys.executable, str(script), str(stacks), store, hang])

    def run(self, rank: int, command: list[str], **environment: str) -> None:
        pulse = self.pulses[rank] = Pulse.create()
        own = {"RANK": str(rank), PULSE_FD: str(pulse.descriptor), **environment}
        with self.errors.open("ab") as errors:
            self.processes[rank] = subprocess.Popen(
                command, env={**os.environ, **own}, pass_fds=[pulse.descriptor], stderr=errors
            )

    @property
    def errors(self) -> Path:
        return self.directory / "errors"

    def states(self) -> list[RankState]:
        pids = {rank: process.pid for rank, process in self.processes.items()}
        beats = {rank: pulse.read() for rank, pulse in self.pulses.items()}
        return rank_states("node-a", self.logs, pids, beats)

    def states_with(self, *wanted: str) -> list[RankState]:
        """Ask until each rank's stacks show where it was sent."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            states = self.states()
            if all(text in state.dump for text, state in zip(wanted, states, strict=True)):
                return states
        raise AssertionError(f"not there: {states}\n{self.errors.read_text()}")


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(tmp_path, tmp_path)
    yield crew
    for process in crew.processes.values():
        process.kill()
        process.wait()
    for pulse in crew.pulses.values():
        pulse.close()


def place_of(text: str, function: str) -> str:
    line = next(i for i, line in enumerate(SCRIPT.splitlines(), 1) if text in line)
    return f"mpt/train/hangs.py:{line} ({function})"


ENDLESS = place_of("while True: pass", "endless")


def test_of_three_ranks_the_one_in_a_loop_is_stuck_and_the_others_wait(crew: Crew) -> None:
    for rank, hang in enumerate(["wait", "endless", "wait"]):
        crew.start(rank, hang, str(crew.directory / "store"))
    states = crew.states_with("all_reduce", "in endless", "all_reduce")
    words = diagnose(states, CFG)
    assert words.startswith(f"rank 1 is stuck in {ENDLESS} in step 17, silent for ")
    caller = place_of("    all_reduce()", "wait")
    assert words.endswith(f"; ranks 0, 2 wait for it in a collective called from {caller}")


def test_a_rank_that_keeps_the_interpreters_lock_still_says_where_it_is(crew: Crew) -> None:
    crew.start(0, "hold_the_lock")
    words = diagnose(crew.states_with("in hold_the_lock"), CFG)
    place = place_of("ctypes.PyDLL", "hold_the_lock")
    assert words.startswith(f"rank 0 is stuck in {place} in step 17, silent for ")


def test_a_rank_that_waits_for_a_thread_of_its_own_is_stuck_where_that_is(crew: Crew) -> None:
    crew.start(0, "read")
    words = diagnose(crew.states_with("in endless"), CFG)
    assert words.startswith(f"rank 0 is stuck in {ENDLESS} in step 17")


def test_a_stopped_rank_is_woken_to_say_where_it_was(crew: Crew) -> None:
    crew.start(0, "endless")
    crew.states_with("in endless")
    crew.processes[0].send_signal(signal.SIGSTOP)
    while process_state(crew.processes[0].pid) != "T":
        time.sleep(0.01)
    states = crew.states_with("in endless")
    words = diagnose(states, CFG)
    assert words.startswith(f"rank 0 was stopped by a signal (SIGSTOP) in {ENDLESS} in step 17")
    assert process_state(crew.processes[0].pid) != "T"


def test_a_rank_that_does_not_know_the_question_yet_survives_it(crew: Crew) -> None:
    crew.run(0, ["sleep", "60"])
    (state,) = crew.states()
    assert crew.processes[0].poll() is None
    assert diagnose([state], CFG).startswith(
        "rank 0 has not begun: it gave no stack while starting"
    )


def test_a_rank_without_a_place_for_its_stacks_writes_them_to_its_log(crew: Crew) -> None:
    crew.logs /= "missing"
    crew.start(0, "endless")
    while crew.pulses[0].read().phase != Phase.STEP:
        time.sleep(0.01)
    crew.processes[0].send_signal(STACK_SIGNAL)
    deadline = time.monotonic() + PATIENCE_S
    while "in endless" not in crew.errors.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "in endless" in crew.errors.read_text()
    assert crew.processes[0].poll() is None


def test_a_rank_that_is_gone_is_said_to_be(crew: Crew) -> None:
    crew.run(0, ["true"])
    while process_state(crew.processes[0].pid) != "Z":
        time.sleep(0.01)
    (state,) = crew.states()
    assert diagnose([state], CFG).startswith("rank 0 has ended unseen")


def test_a_worker_answers_from_its_first_moments_and_a_crash_leaves_its_stack(crew: Crew) -> None:
    run_dir = crew.directory
    logs = crew.logs = run_dir / "logs" / "attempt-0"
    os.mkfifo(run_dir / "recipe.yaml")  # it opens this, and nobody writes
    worker = [sys.executable, "-m", "mpt.train.worker", str(run_dir)]
    crew.run(0, worker, MPT_ATTEMPT="0", MPT_SUPERVISOR_PID=str(os.getpid()))
    (state,) = crew.states_with("mpt/train/worker.py")
    assert state.thread in parse_stacks(state.dump), "the main thread is known"
    assert "while starting" in diagnose([state], CFG)
    crew.processes[0].send_signal(signal.SIGSEGV)
    assert crew.processes[0].wait(PATIENCE_S) == -signal.SIGSEGV
    log = (logs / "rank-0.log").read_text()
    assert "Segmentation fault" in log
    assert "most recent call first" in log
