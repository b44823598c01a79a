"""The batch script under a real shell, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mpt.launch import slurm
from mpt.launch.slurm import BatchJob, Cluster, cluster_from_slurm
from mpt.log import Journal

Event = tuple[str, dict[str, Any]]

GOLDEN = Path(__file__).parents[1] / "golden"
JOB = BatchJob(
    name="mpt-7b",
    nodes=(3, 4),
    spares=1,
    command=("/opt/mpt/bin/mpt", "train", "/home/me/7b.yaml", "run=a b", "--nnodes", "3:4"),
    directory=Path("/home/me/it's here"),
    events=Path("/shared/runs/mpt-7b/events.jsonl"),
    grace_s=300,
    gpus_per_node=8,
    time="2-00:00:00",
    partition="gpu",
    account="lab",
    qos="high",
)

SRUN = """#!/bin/bash
# Runs the command once for each node, as Slurm does; ends with the highest code.
printf '%s\\0' "$@" >"$LAB/srun.argv"
while [[ $1 == -* ]]; do shift; done
pids=()
for ((i = 0; i < NODES; i++)); do
    SLURM_STEP_ID=0 SLURM_PROCID=$i SLURM_STEP_NUM_NODES=$NODES SLURM_STEP_NUM_TASKS=$NODES \\
        SLURM_STEP_NODELIST="n[08-$(printf %02d $((7 + NODES)))]" \\
        SLURMD_NODENAME="n$(printf %02d $((8 + i)))" "$@" &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    ((code > worst)) && worst=$code
done
exit "$worst"
"""

MPT = """#!/bin/bash
printf '%s\\0' "$@" >"$LAB/mpt-$SLURM_PROCID.argv"
env -0 >"$LAB/mpt-$SLURM_PROCID.env"
pwd >"$LAB/mpt-$SLURM_PROCID.cwd"
said=$LAB/said/events.jsonl
[[ $SLURM_PROCID != 0 || ! -f $said ]] || cat "$said" >>"$LAB/run/events.jsonl"
if [[ -p $LAB/go ]]; then
    touch "$LAB/here"
    read -r <"$LAB/go" # until it is told to end
fi
exit "$(cat "$LAB/code-$SLURM_PROCID")"
"""


@dataclass(frozen=True)
class Lab:
    """A directory with srun and scontrol that write down how they were called."""

    path: Path
    started: list[subprocess.Popen[str]]

    def job(self) -> BatchJob:
        command = (str(self.path / "bin" / "mpt"), "train")
        events = self.path / "run" / "events.jsonl"
        return replace(JOB, command=command, directory=self.path, events=events)

    def start(self, job: BatchJob, codes: list[int]) -> subprocess.Popen[str]:
        """Start the script as the batch step of job 42."""
        for rank, code in enumerate(codes):
            (self.path / f"code-{rank}").write_text(f"{code}\n")
        script = self.path / "submit.sbatch"
        script.write_text(slurm.script(job))
        environment = {
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "LAB": str(self.path),
            "NODES": str(len(codes)),
            "SLURM_JOB_ID": "42",
        }
        process = subprocess.Popen(
            ["bash", str(script)],
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, job: BatchJob, codes: list[int]) -> int:
        process = self.start(job, codes)
        _, said = process.communicate(timeout=60)
        assert not said, said
        return process.returncode

    def events(self, directory: str, events: list[Event]) -> None:
        """Have events written as a run writes them."""
        for kind, fields in events:
            Journal(self.path / directory).event(kind, **fields)

    @property
    def requeued(self) -> bool:
        path = self.path / "scontrol.argv"
        if not path.exists():
            return False
        assert words(path) == ["requeue", "42"]
        return True


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "said").mkdir()
    scontrol = '#!/bin/bash\nprintf \'%s\\0\' "$@" >"$LAB/scontrol.argv"\n'
    for name, text in (("srun", SRUN), ("mpt", MPT), ("scontrol", scontrol)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    found = Lab(tmp_path, [])
    yield found
    for process in found.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def words(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]


def test_the_script_is_the_golden_one() -> None:
    assert not list(slurm.problems(JOB))
    assert slurm.script(JOB) == (GOLDEN / "submit.sbatch").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ([0, 0], 0, False),
        ([75, 75], 75, True),
        ([0, 75], 75, True),
        ([1, 1], 1, False),
        ([2, 2], 2, False),
        ([3, 3], 3, False),
        ([4, 4], 4, False),
        ([5, 5], 5, False),
        ([6, 6], 6, False),
        ([130, 130], 130, False),
        ([137, 137], 137, False),
        ([143, 143], 143, False),
    ],
)
def test_only_a_preempted_job_is_queued_again(
    lab: Lab, codes: list[int], code: int, requeued: bool
) -> None:
    assert lab.run(lab.job(), codes) == code
    assert lab.requeued == requeued


LOST: Event = ("fault", {"attempt": 0, "kind": "node_lost", "why": "silent"})
KILLED: Event = ("fault", {"attempt": 0, "kind": "killed", "why": '"event": "finished"'})
STARTED: Event = ("attempt_started", {"attempt": 1})
SAVED: Event = ("checkpoint", {"step": 5})
STOPPED: Event = ("stopped", {"attempt": 0, "signal": 10, "step": 7})
FINISHED: Event = ("finished", {"attempt": 0, "step": 9})
GAVE_UP: Event = ("gave_up", {"why": "too few nodes"})


@pytest.mark.parametrize(
    ("codes", "before", "during", "code", "requeued"),
    [
        ([75, 137], [], [STOPPED], 75, True),
        ([0, 137], [], [LOST, FINISHED], 0, False),
        ([5, 137], [], [SAVED, LOST, GAVE_UP], 75, True),
        ([5, 5], [], [SAVED, LOST, GAVE_UP], 75, True),
        ([5, 137], [], [LOST, GAVE_UP], 137, False),
        ([5, 137], [SAVED], [LOST, GAVE_UP], 137, False),
        ([5, 5], [], [SAVED, LOST, KILLED, GAVE_UP], 5, False),
        ([1, 137], [], [KILLED], 137, False),
        ([1, 137], [], [STOPPED, STARTED], 137, False),
        ([1, 1], [STOPPED], [], 1, False),
        ([2, 2], [], [STOPPED], 2, False),
        ([130, 130], [], [STOPPED], 130, False),
    ],
)
def test_a_dead_node_does_not_hide_how_the_run_ended(
    lab: Lab,
    codes: list[int],
    before: list[Event],
    during: list[Event],
    code: int,
    requeued: bool,
) -> None:
    lab.events("run", before)
    lab.events("said", during)
    assert lab.run(lab.job(), codes) == code
    assert lab.requeued == requeued


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True), (None, True)]
)
def test_a_cancelled_job_does_not_come_back(
    lab: Lab, number: signal.Signals | None, requeued: bool
) -> None:
    os.mkfifo(lab.path / "go")
    process = lab.start(lab.job(), [75])
    deadline = time.monotonic() + 60
    while not (lab.path / "here").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number is not None:
        process.send_signal(number)  # to the shell alone
    with (lab.path / "go").open("w") as go:
        go.write("\n")
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert lab.requeued == requeued


HOSTILE = [
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"$HOME"',
    "{x}",
    "*",
    "-",
]


def test_no_word_of_the_command_means_anything_to_the_shell(lab: Lab) -> None:
    here = lab.path / "it's $(touch pwned) here"
    here.mkdir()
    job = lab.job()
    job = replace(job, command=(*job.command, *HOSTILE), directory=here, events=here / "e'$(x)")
    assert not list(slurm.problems(job))
    assert lab.run(job, [0, 0]) == 0
    for rank in (0, 1):
        assert words(lab.path / f"mpt-{rank}.argv") == ["train", *HOSTILE]
        assert (lab.path / f"mpt-{rank}.cwd").read_text() == f"{here}\n"
    assert not list(lab.path.rglob("pwned"))


@pytest.mark.parametrize("option", ["name", "partition", "account", "qos"])
@pytest.mark.parametrize(
    "value", ["", "a b", "a\n#SBATCH --uid=0", "a\n", "$(x)", "-x", "a;b", "a'b", 'a"b', "a#b", "é"]
)
def test_what_sbatch_would_read_as_more_than_a_word_is_refused(option: str, value: str) -> None:
    (problem,) = slurm.problems(replace(JOB, **{option: value}))  # type: ignore[arg-type]
    assert f"--{option}: " in problem


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x00b", "a\x1b[2Jb"])
def test_control_characters_are_refused_wherever_they_are(text: str) -> None:
    for job in (
        replace(JOB, command=("mpt", text)),
        replace(JOB, directory=Path(text)),
        replace(JOB, events=Path(text)),
    ):
        assert len(list(slurm.problems(job))) == 1


@pytest.mark.parametrize(
    ("limit", "good"),
    [
        ("0", True),
        ("7", True),
        ("6", False),
        ("6:00", False),
        ("6:01", True),
        ("0:06:00", False),
        ("01:00:00", True),
        ("0-1", True),
        ("1-2:3", True),
        ("1-2:3:4", True),
        ("0-0:6", False),
        ("1:2:3:4", False),
        ("soon", False),
        ("", False),
        ("5\n", False),
    ],
)
def test_a_time_limit_leaves_time_to_train(limit: str, good: bool) -> None:
    assert JOB.grace_s + slurm.MARGIN_S == 360
    assert bool(list(slurm.problems(replace(JOB, time=limit)))) != good


def test_a_grace_that_slurm_cannot_give_is_refused() -> None:
    assert not list(slurm.problems(replace(JOB, grace_s=65475, time=None)))
    assert list(slurm.problems(replace(JOB, grace_s=65476, time=None)))


@pytest.mark.parametrize(
    ("nodes", "spares", "asked", "goes_on"),
    [((4, 4), 0, "4", False), ((4, 4), 2, "6", True), ((3, 4), 0, "3-4", True)],
)
def test_slurm_leaves_a_lost_node_to_a_run_that_can_do_without(
    nodes: tuple[int, int], spares: int, asked: str, goes_on: bool
) -> None:
    lines = slurm.script(replace(JOB, nodes=nodes, spares=spares)).splitlines()
    assert f"#SBATCH --nodes={asked}" in lines
    assert ("#SBATCH --no-kill" in lines) == goes_on
    (srun,) = (line for line in lines if line.startswith("srun "))
    assert ("--no-kill" in srun) == goes_on


def test_each_node_finds_its_place_under_srun(lab: Lab) -> None:
    assert lab.run(lab.job(), [0, 0, 0]) == 0
    found = []
    for rank in range(3):
        environment = dict(word.split("=", 1) for word in words(lab.path / f"mpt-{rank}.env"))
        found.append(cluster_from_slurm(environment))
    assert found == [Cluster(3, node, "n08", 20042) for node in ("n08", "n09", "n10")]
