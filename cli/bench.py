"""`mpt bench`: what a training step of a recipe costs on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import render


def bench(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, that do not.")] = 5,
    real: Annotated[
        bool, typer.Option("--real", help="Read the recipe's data; default: random tokens.")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Workers; the same as launch.nproc.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Take real training steps of a recipe, time them part by part, and save nothing."""
    from mpt import recipe
    from mpt.bench.run import bench as measure

    changes = [*(overrides or []), *([] if nproc is None else [f"launch.nproc={nproc}"])]
    cfg = recipe.load(recipe_file, changes)
    found: dict[str, Any] = measure(cfg, steps=steps, warmup=warmup, real=real)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        render.measured(found)
