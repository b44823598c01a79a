"""`mpt chaos`: prove on this machine that a run of a recipe survives what may happen to it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpt.errors import EXIT_INTERNAL, UsageError

from . import render
from .run import AsJson, Overrides, RecipeFile

PAGE_WIDTH = 120
"""Columns of the table where there is no terminal to ask."""

if TYPE_CHECKING:
    from mpt.chaos.prove import Proof


def chaos(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    faults: Annotated[int, typer.Option(help="Faults to make.", min=1)] = 12,
    kinds: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Kinds of fault; default: all.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes, as processes of this machine.", min=1)] = 2,
    nproc: Annotated[int, typer.Option(help="Workers a node.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of what is hit, and when.")] = 0,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="For both runs; default: runs/<run>-chaos.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier chaos left there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe under faults and again without, and compare the weights."""
    from mpt import recipe
    from mpt.chaos.plan import KINDS
    from mpt.chaos.prove import MARK, Storms, prove
    from mpt.data.dataset import tokenizer_problems

    cfg = recipe.load(recipe_file, overrides or [], checks=[tokenizer_problems])
    wanted = [name.strip() for name in kinds.split(",")] if kinds else list(KINDS)
    if unknown := [name for name in wanted if name not in KINDS]:
        raise UsageError(f"--kinds: {', '.join(unknown)}: there are {', '.join(KINDS)}.")
    where = directory or Path("runs") / f"{cfg.run}-chaos"
    if where.exists():
        if not overwrite:
            raise UsageError(f"{where}: is there already; use --overwrite, or another --dir.")
        if any(where.iterdir()) and not (where / MARK).exists():
            raise UsageError(f"{where}: was not made by mpt chaos, and is not deleted.")
        shutil.rmtree(where)
    storms = Storms(faults, tuple(k for k in KINDS if k in wanted), nodes, nproc, seed)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)  # by an exception, so that the nodes are ended as well
    proof = prove(cfg, recipe_file, overrides or [], where.absolute(), storms, render.tell)
    if as_json:
        typer.echo(json.dumps({"held": proof.held, **dataclasses.asdict(proof)}))
    else:
        _show(proof)
    if not proof.held:
        raise typer.Exit(EXIT_INTERNAL)


def _end(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def _show(proof: Proof) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "fault", "hit", "at step", "detected in", "next step in", "resumed from", box=None
    )
    table.add_column("steps again", justify="right")
    for row in proof.rows:
        table.add_row(
            row.fault,
            row.target,
            f"{row.step:,}",
            _seconds(row.detected_s),
            _seconds(row.recovered_s),
            row.resumed_from or "-",
            f"{row.recomputed:,}",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PAGE_WIDTH
    console.print(table)
    goodput = "-" if proof.goodput is None else f"{proof.goodput:.1%}"
    console.print(
        f"{proof.steps:,} steps in {proof.storm_s:,.0f} s under {len(proof.rows)} faults, "
        f"{proof.calm_s:,.0f} s without; {proof.lost_steps:,} steps taken again; goodput {goodput}"
    )
    if len(proof.rows) < proof.n_planned:
        console.print(
            f"[red]{proof.n_planned - len(proof.rows)} faults did not come: the run was over[/]"
        )
    for breach in proof.breaches:
        console.print(f"[red]data: {breach}[/]")
    same = (
        "the same weights, bit for bit"
        if proof.identical
        else (f"[red]other weights: they differ by up to {proof.max_difference:.3g}[/]")
    )
    console.print(f"verdict: {'[green]held[/]' if proof.held else '[red]broken[/]'}: {same}")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} s"
