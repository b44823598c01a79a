"""`mpt train`, `resume`, `status`, `verify` and `init`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mpt.errors import EXIT_CHECKPOINT, UsageError
from mpt.recipe.activations import Recompute

from . import render
from .data import watch_progress
from .prospect import Prospect

if TYPE_CHECKING:
    from mpt.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe YAML.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")]
CheckOnly = Annotated[bool, typer.Option("--check", help="Print the plan, start nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Nproc = Annotated[
    int | None, typer.Option("--nproc", help="Workers a node; the same as launch.nproc.")
]
Nnodes = Annotated[
    str | None,
    typer.Option("--nnodes", metavar="N|MIN:MAX", help="Nodes; the same as launch.nnodes."),
]
Rendezvous = Annotated[
    str | None,
    typer.Option("--rdzv", metavar="HOST:PORT", help="Which node leads first, and where."),
]
NodeName = Annotated[
    str | None, typer.Option("--node", help="Name of this node; default: the host's.")
]


def train(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run lives; default: runs/<run>.")
    ] = None,
    nproc: Nproc = None,
    nnodes: Nnodes = None,
    rdzv: Rendezvous = None,
    node: NodeName = None,
    check: CheckOnly = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from a recipe, or go on with it: the same command does both."""
    from mpt import recipe
    from mpt.data.dataset import tokenizer_problems
    from mpt.data.streams import misfit, parts_of, sizes_here

    changes = [*(overrides or []), *_launch_overrides(nproc, nnodes)]
    cfg = recipe.load(recipe_file, changes, checks=[tokenizer_problems])
    directory = run_dir or Path("runs") / cfg.run
    if check:
        sizes = sizes_here(cfg.data)
        render.plan(cfg, _prospects(cfg, directory), parts_of(cfg, sizes), directory, as_json)
        if (said := misfit(cfg, sizes)) is not None:
            render.tell(said)
        return
    code = _start(cfg, directory, recipe_file, rdzv, node)
    if as_json:
        status(directory, as_json=True)
    raise typer.Exit(code)


def resume(
    run_dir: RunDir,
    overrides: Overrides = None,
    nproc: Nproc = None,
    nnodes: Nnodes = None,
    rdzv: Rendezvous = None,
    node: NodeName = None,
) -> None:
    """Go on with a run from its newest checkpoint; keys such as optimizer.lr may change."""
    from mpt.train.start import thaw

    cfg = thaw(run_dir, [*(overrides or []), *_launch_overrides(nproc, nnodes)])
    raise typer.Exit(_start(cfg, run_dir, None, rdzv, node))


def status(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show how a run is doing; reads files only."""
    from mpt.status import read_status

    found = read_status(run_dir)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        render.status(found)


def verify(
    path: Annotated[Path, typer.Argument(metavar="RUN_DIR|CHECKPOINT")], as_json: AsJson = False
) -> None:
    """Hash every file of the checkpoints; exit code 4 if one is damaged."""
    from mpt.checkpoint.layout import verify_all

    found = verify_all(path)
    if as_json:
        typer.echo(json.dumps({str(directory): problems for directory, problems in found.items()}))
    else:
        render.verified(found)
    if any(found.values()):
        raise typer.Exit(EXIT_CHECKPOINT)


def init(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A shipped recipe.")] = None,
) -> None:
    """Write a shipped recipe into the current folder; without a name, list them."""
    from mpt.recipe.shipped import shipped_recipes

    recipes = shipped_recipes()
    if name is None:
        render.recipes(recipes)
        return
    name = name.removesuffix(".yaml")
    if name not in recipes:
        raise UsageError(f"no recipe is called {name!r}; there are: {', '.join(recipes)}.")
    path = Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(recipes[name])
    except FileExistsError:
        raise UsageError(f"{path}: is there already; move it, or train it as it is.") from None
    typer.echo(path)
    print(f"mpt: next: mpt train {path}", file=sys.stderr)


def _prospects(cfg: Recipe, run_dir: Path) -> list[Prospect]:
    """Return how the recipe is run on this machine, and on GPUs if it has none."""
    from mpt.launch.plan import count_gpus, first_gpu, n_workers
    from mpt.recipe.budget import plan
    from mpt.recipe.fit import Machine, beside_bytes, fit
    from mpt.recipe.machine import this_cpu
    from mpt.recipe.premises import premises, recalled
    from mpt.recipe.probing import probe_pays
    from mpt.rundir import read_chosen

    n_gpus = count_gpus()
    n_local = n_workers(cfg.launch.nproc, n_gpus)
    world_size = n_local * cfg.launch.max_nodes

    def prospect(machine: Machine) -> Prospect:
        chosen = fit(cfg, machine, world_size)
        here = premises(cfg, machine, world_size)
        by = "estimate" if cfg.train.microbatch_size == "auto" else "recipe"
        if probe_pays(cfg, machine, chosen, world_size):
            by = "probe"
        for entry in read_chosen(run_dir):
            with suppress(ValueError, KeyError):
                if by != "recipe" and entry["premises"] == here:
                    chosen, by = recalled(chosen, entry["chosen"], cfg, world_size), "memory"
        attention, replicas = chosen.attention.backend, chosen.replicas
        beside = beside_bytes(chosen, cfg, world_size)
        plans = [
            plan(cfg, world_size, attention, how, replicas, beside) for how in get_args(Recompute)
        ]
        return Prospect(machine, chosen, by, plans)

    if n_gpus:
        return [prospect(first_gpu(n_local))]
    here = prospect(this_cpu(n_local))
    with suppress(UsageError):  # what the recipe asks for is made for CPUs
        return [here, prospect(first_gpu(n_local))]
    return [here]


def _start(
    cfg: Recipe, run_dir: Path, source: Path | None, rdzv: str | None, node: str | None
) -> int:
    from mpt.launch.place import find_place
    from mpt.launch.slurm import cluster_from_slurm
    from mpt.train.start import start

    if (cluster := cluster_from_slurm(os.environ)) is not None:  # what nobody has said, it says
        rdzv = rdzv or f"{cluster.first_host}:{cluster.port}"
        node = node or cluster.node
        if cfg.launch.nnodes == 1:
            launch = dataclasses.replace(cfg.launch, nnodes=cluster.nnodes)
            cfg = dataclasses.replace(cfg, launch=launch)
    place = find_place(node, rdzv, several=cfg.launch.max_nodes > 1)
    return start(
        cfg, run_dir, source=source, place=place, tell=render.tell, progress=watch_progress
    )


def _launch_overrides(nproc: int | None, nnodes: str | None) -> list[str]:
    wanted = {"nproc": nproc, "nnodes": nnodes and f'"{nnodes}"'}
    return [f"launch.{key}={value}" for key, value in wanted.items() if value is not None]
