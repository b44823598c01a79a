"""`mpt submit`: write the job that trains a recipe on a cluster, and hand it to the scheduler."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpt.errors import UsageError

from . import render
from .run import Overrides, RecipeFile

if TYPE_CHECKING:
    from mpt.recipe import Recipe


class Scheduler(StrEnum):
    """Who starts the job."""

    SLURM = "slurm"
    KUBERNETES = "kubernetes"


class Kind(StrEnum):
    """What Kubernetes is given."""

    TRAINJOB = "trainjob"
    JOBSET = "jobset"
    JOB = "job"


ByWhom = Annotated[Scheduler, typer.Option(help="Who starts the job.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print it, submit nothing.")]
RunDir = Annotated[
    str | None, typer.Option(help="Where the run lives, seen by all nodes; default: runs/<run>.")
]
Name = Annotated[str | None, typer.Option(help="Of the job; default: the run's.")]
Nodes = Annotated[str | None, typer.Option(metavar="N|MIN:MAX", help="The same as launch.nnodes.")]
Spares = Annotated[int, typer.Option(min=0, help="Nodes more that stand by.")]
Gpus = Annotated[int | None, typer.Option(min=1, help="GPUs to ask for on each node.")]

_OF_SLURM, _OF_KUBERNETES = "Slurm", "Kubernetes"
Time = Annotated[
    str | None, typer.Option(help="Limit, such as 2-00:00:00.", rich_help_panel=_OF_SLURM)
]
OfSlurm = Annotated[str | None, typer.Option(rich_help_panel=_OF_SLURM)]
OneKind = Annotated[
    Kind | None, typer.Option(help="Default: trainjob.", rich_help_panel=_OF_KUBERNETES)
]
Image = Annotated[
    str | None, typer.Option(help="With mpt on its PATH.", rich_help_panel=_OF_KUBERNETES)
]
Claim = Annotated[
    str | None,
    typer.Option(
        help="PersistentVolumeClaim of run directory and data, mounted at /workspace.",
        rich_help_panel=_OF_KUBERNETES,
    ),
]
Namespace = Annotated[str | None, typer.Option(rich_help_panel=_OF_KUBERNETES)]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a job of either scheduler is made of."""

    recipe_file: Path
    overrides: tuple[str, ...]
    nodes: str | None
    run_dir: str | None
    name: str | None
    spares: int
    gpus_per_node: int | None

    @property
    def changes(self) -> list[str]:
        """The overrides, that of --nodes last."""
        return [*self.overrides, *([f"launch.nnodes={self.nodes}"] if self.nodes else [])]


def submit(
    recipe_file: RecipeFile,
    scheduler: ByWhom,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    run_dir: RunDir = None,
    name: Name = None,
    nodes: Nodes = None,
    spares: Spares = 0,
    gpus_per_node: Gpus = None,
    time: Time = None,
    partition: OfSlurm = None,
    account: OfSlurm = None,
    qos: OfSlurm = None,
    kind: OneKind = None,
    image: Image = None,
    claim: Claim = None,
    namespace: Namespace = None,
) -> None:
    """Train a recipe on a cluster: write the job, and hand it to Slurm or Kubernetes."""
    asked = Asked(
        recipe_file=recipe_file,
        overrides=tuple(overrides or ()),
        nodes=nodes,
        run_dir=run_dir,
        name=name,
        spares=spares,
        gpus_per_node=gpus_per_node,
    )
    for_slurm = {"time": time, "partition": partition, "account": account, "qos": qos}
    for_pods = {"kind": kind, "image": image, "claim": claim, "namespace": namespace}
    if scheduler is Scheduler.SLURM:
        _refuse(_foreign(scheduler, for_pods))
        path, text = _batch_script(asked, for_slurm)
        command = ["sbatch", str(path)]
    else:
        _refuse(_foreign(scheduler, for_slurm))
        path, text = _manifests(asked, for_pods)
        command = ["kubectl", "apply", "-f", str(path)]
    if dry_run:
        typer.echo(text, nl=False)
    else:
        _hand_over(command, path, text)


def _batch_script(asked: Asked, options: Mapping[str, str | None]) -> tuple[Path, str]:
    """Return the script, and where it is kept: in the run directory."""
    from mpt import recipe
    from mpt.data.dataset import tokenizer_problems
    from mpt.launch import slurm
    from mpt.rundir import EVENTS

    cfg = recipe.load(asked.recipe_file, asked.changes, checks=[tokenizer_problems])
    run_dir = (Path(asked.run_dir) if asked.run_dir else Path("runs") / cfg.run).absolute()
    where = ["--run-dir", str(run_dir), "--nnodes", str(cfg.launch.nnodes)]
    job = slurm.BatchJob(
        name=asked.name or cfg.run,
        nodes=(cfg.launch.min_nodes, cfg.launch.max_nodes),
        spares=asked.spares,
        command=(*_mpt(), "train", str(asked.recipe_file.absolute()), *asked.overrides, *where),
        directory=Path.cwd(),
        events=run_dir / EVENTS,
        grace_s=cfg.launch.stop_grace_s,
        gpus_per_node=asked.gpus_per_node,
        **options,
    )
    _refuse([*_gpu_problems(cfg, asked.gpus_per_node), *slurm.problems(job)])
    return run_dir / "submit.sbatch", slurm.script(job)


def _manifests(asked: Asked, options: Mapping[str, str | None]) -> tuple[Path, str]:
    """Return the manifests, and where they are kept: here, as the run directory is elsewhere."""
    from mpt import recipe
    from mpt.launch import kubernetes

    # In a pod other files lie under the same paths, so only the recipe itself is checked.
    cfg = recipe.load(asked.recipe_file, asked.changes)
    _refuse(f"--{key}: is needed by Kubernetes." for key in ("image", "claim") if not options[key])
    job = kubernetes.PodJob(
        kind=Kind(options["kind"] or Kind.TRAINJOB).value,
        name=asked.name or cfg.run,
        namespace=options["namespace"],
        image=options["image"] or "",
        claim=options["claim"] or "",
        nodes=(cfg.launch.min_nodes, cfg.launch.max_nodes),
        spares=asked.spares,
        gpus_per_node=asked.gpus_per_node,
        recipe=asked.recipe_file.read_text(encoding="utf-8"),
        overrides=asked.overrides,
        run_dir=kubernetes.SHARED / (asked.run_dir or f"runs/{cfg.run}"),
        grace_s=cfg.launch.stop_grace_s,
        max_failures=cfg.launch.max_restarts,
    )
    _refuse([*_gpu_problems(cfg, asked.gpus_per_node), *kubernetes.problems(job)])
    return Path(f"{job.name}.kubernetes.yaml"), kubernetes.manifests(job)


def _foreign(scheduler: Scheduler, options: Mapping[str, str | None]) -> Iterator[str]:
    """Yield which options mean nothing to the scheduler: dropped, they would seem to work."""
    given = (option for option, value in options.items() if value is not None)
    yield from (f"--{option}: means nothing to {scheduler}." for option in given)


def _gpu_problems(cfg: Recipe, gpus_per_node: int | None) -> Iterator[str]:
    nproc = cfg.launch.nproc
    if gpus_per_node is None:
        render.tell("no GPUs are asked for: --gpus-per-node N")
    elif nproc != "auto" and nproc > gpus_per_node:
        yield f"launch.nproc: {nproc} workers on --gpus-per-node {gpus_per_node}; one each."


def _refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise UsageError("\n     ".join(found))


def _mpt() -> list[str]:
    """Return the command that starts this very mpt, on a node that sees the same files."""
    beside = Path(sys.executable).with_name("mpt")
    # -P: what lies in the directory that the job starts in is no module.
    return [str(beside)] if beside.is_file() else [sys.executable, "-P", "-m", "mpt.cli.main"]


def _hand_over(command: list[str], path: Path, text: str) -> None:
    """Write the job and give it to the scheduler; its answer goes to stdout."""
    from mpt.storage import atomic_write

    if shutil.which(command[0]) is None:
        raise UsageError(
            f"{command[0]}: is not on this machine; --dry-run prints what it would be given."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise UsageError(f"{command[0]} refused {path}: {why}")
    render.tell(f"wrote {path}")
    typer.echo(done.stdout, nl=False)
