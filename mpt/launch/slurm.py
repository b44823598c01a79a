"""Slurm: a batch script that trains a recipe, and this node's place in a job that runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpt.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_RESTARTS, UsageError

FIRST_PORT, N_PORTS = 20000, 10000
"""Below the ports that Linux hands out by itself (from 32768), above those of known services."""

MARGIN_S = 60
"""After the last worker has saved or was killed: for supervisors, srun and the script to end."""

LONGEST_SIGNAL_S = 65535
"""The most that `sbatch --signal` takes."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,@+:=-]{0,127}")
"""What may follow `#SBATCH --option=`, where no quoting helps."""

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """What `sbatch` is asked for."""

    name: str
    nodes: tuple[int, int]
    """The fewest and the most that train together."""
    spares: int = 0
    """Nodes more that stand by."""
    command: tuple[str, ...]
    """What each node runs."""
    directory: Path
    """Where it runs: relative paths of the recipe begin here."""
    events: Path
    """The run's log of events."""
    grace_s: int
    """What workers have to finish a step and save."""
    gpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None


def problems(job: BatchJob) -> Iterator[str]:
    """Yield why a job cannot be written as a script."""
    for option in ("name", "partition", "account", "qos"):
        value = getattr(job, option)
        if value is not None and not _WORD.fullmatch(value):
            yield f"--{option}: {value!r} has characters that a script cannot pass on to sbatch."
    for text in (*job.command, str(job.directory), str(job.events)):
        if _CONTROL.search(text):
            yield f"{text!r} has control characters."
    warned_s = job.grace_s + MARGIN_S
    if warned_s > LONGEST_SIGNAL_S:
        yield (
            f"launch.stop_grace_s: {job.grace_s} is more than Slurm can warn ahead; "
            f"use at most {LONGEST_SIGNAL_S - MARGIN_S}."
        )
    limit_s = 0 if job.time is None else _seconds(job.time)
    if limit_s is None:
        yield f"--time: {job.time!r} is not a time limit; use 90 (minutes), 12:00:00 or 2-00."
    elif 0 < limit_s <= warned_s:
        yield (
            f"--time: {job.time} is over before it began: workers are told to save {warned_s} s "
            "ahead (launch.stop_grace_s and a minute)."
        )


def script(job: BatchJob) -> str:
    """Return the batch script; `problems` has found none.

    `--signal` without `B:` reaches the tasks of srun, not the shell: so do preemption's signals,
    and both mean that the supervisors save and end with 75, upon which the job is queued again.
    That the shell hears SIGTERM too happens only at scancel and past the time limit, when a job
    must not come back. Where the run can go on with the nodes that are left when one is lost,
    `--no-kill` leaves the job to it; where it cannot, Slurm ends the job and queues it again.
    """
    fewest, most = (count + job.spares for count in job.nodes)
    options = {
        "job-name": job.name,
        "nodes": f"{fewest}-{most}" if fewest < most else f"{most}",
        "ntasks-per-node": "1",
        "gpus-per-node": None if job.gpus_per_node is None else f"{job.gpus_per_node}",
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "mem": "0",  # all there is on a node
        "open-mode": "append",
        "signal": f"USR1@{job.grace_s + MARGIN_S}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    flags = ["--exclusive", "--requeue", *(["--no-kill"] if most > job.nodes[0] else [])]
    lines += [f"#SBATCH {flag}" for flag in flags]
    return _SCRIPT.format(
        options="\n".join(lines),
        directory=shlex.quote(str(job.directory)),
        events=shlex.quote(str(job.events)),
        srun=" --no-kill" * (most > job.nodes[0]) + " --label" * (most > 1),
        command=shlex.join(job.command),
        preempted=EXIT_PREEMPTED,
        restarts=EXIT_RESTARTS,
        done=EXIT_DONE,
    )


_SCRIPT = """\
#!/bin/bash
{options}

# Written by `mpt submit`. Each node runs a supervisor; together they repair what breaks. Slurm
# tells them, and not this shell, of preemption and of the time limit: they save and end with
# {preempted}, and the job is queued again. It goes on where it was saved.
set -u
cd -- {directory} || exit 2
events={events}
seen=0
[ ! -f "$events" ] || seen=$(wc -c <"$events")
news() {{ [ ! -f "$events" ] || tail -c "+$((seen + 1))" -- "$events"; }} # of this job alone

told_to_end=
trap 'told_to_end=1' TERM # at scancel, and past the time limit: then it must not come back
trap : USR1

code=0
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0{srun} \\
    {command} || code=$?

# srun ends with the highest code of all nodes: one that died hides what the others said. If too
# few were left, other nodes may do; but a job that got no further would come back for ever.
if [ "$code" -eq 1 ] || [ "$code" -eq {restarts} ] || [ "$code" -gt 130 ]; then
    case $(news | grep -E '"event": "(attempt_started|fault|stopped|finished)"' | tail -n 1) in
    *'"event": "finished"'*) code={done} ;;
    *'"event": "stopped"'*) code={preempted} ;;
    *'"kind": "node_lost"'*) ! news | grep -q '"event": "checkpoint"' || code={preempted} ;;
    esac
fi
if [ "$code" -eq {preempted} ] && [ -z "$told_to_end" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Cluster:
    """This node's place among those of a job step."""

    nnodes: int
    """Nodes of the step, spares included."""
    node: str
    """This one's name."""
    first_host: str
    """The node that leads first."""
    port: int
    """Where it listens: the same on every node, and another for each of 10,000 jobs in a row."""


def cluster_from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Return where this process is in a job step that srun has spread over several nodes.

    Returns:
        None outside of srun, as in a batch script or an interactive shell, and on one node.

    Raises:
        UsageError: if srun started more than one task on a node, or Slurm's variables are odd.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    nnodes = _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    n_tasks = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if n_tasks != nnodes:
        raise UsageError(
            f"srun started {n_tasks} tasks on {nnodes} nodes; mpt starts its workers by itself. "
            "Use srun --ntasks-per-node=1."
        )
    if nnodes == 1:
        return None
    if not (node := environ.get("SLURMD_NODENAME")):
        raise UsageError("SLURMD_NODENAME: is not set; was this started by srun?")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    port = FIRST_PORT + _number(environ, "SLURM_JOB_ID") % N_PORTS
    return Cluster(nnodes, node, next(expand(nodes)), port)


def expand(nodes: str) -> Iterator[str]:
    """Yield the names in a Slurm node list such as `gpu[001-003,7],login1`, in its order.

    Raises:
        UsageError: if it is not one.
    """
    parts = re.findall(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+", nodes)
    if not parts or ",".join(parts) != nodes:
        raise UsageError(f"SLURM_JOB_NODELIST: {nodes!r} is not a list of nodes.")
    for part in parts:
        yield from _spelled_out(part)


def _spelled_out(part: str) -> Iterator[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    ranges, _, after = rest.partition("]")
    for number in _numbers(ranges):
        yield from (f"{before}{number}{end}" for end in _spelled_out(after))


def _numbers(ranges: str) -> Iterator[str]:
    """Yield `001`, `002`, `003`, `7` for `001-003,7`: as wide as the first of a range."""
    for each in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", each)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"SLURM_JOB_NODELIST: {each!r} is not a range of nodes.")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield f"{number:0{len(match[1])}}"


def _number(environ: Mapping[str, str], *names: str) -> int:
    text = next((environ[name] for name in names if name in environ), "")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UsageError(f"{names[0]}: {text!r} is not a number; was this started by srun?")
    return int(text)


def _seconds(limit: str) -> int | None:
    """Return a time limit in seconds, 0 for none; None if it is not one of Slurm's forms."""
    match = _TIME.fullmatch(limit)
    if match is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)
