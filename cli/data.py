"""`mpt data`: make datasets from text, look into them, and check them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpt.errors import EXIT_DATA

from .report import report

if TYPE_CHECKING:
    from mpt.data.dataset import Dataset
    from mpt.data.plan import Progress as PrepareProgress
    from mpt.data.plan import Watch

RecipeFile = Annotated[Path, typer.Argument(help="Recipe YAML.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe keys to change.", metavar="[KEY=VALUE]...")
]
DatasetPath = Annotated[
    str, typer.Argument(help="A directory of shards, or its URL.", metavar="PATH")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Samples = Annotated[int, typer.Option(help="First samples to show.", min=0)]
Workers = Annotated[
    int | None, typer.Option(help="Processes that tokenize; by default one for each core.", min=1)
]
TokenizerFile = Annotated[Path | None, typer.Option(help="Shows samples as text.")]

SHOWN_IDS = 32
STAGES = {
    "waiting": "waiting for another process that prepares here",
    "version": "going on with the version of the table that the call read that was cut short; "
    "delete *.source.json beside the dataset to begin with the newest",
    "tokenizer": "training a tokenizer",
    "held-out": "reading the texts that are held out",
    "again": "the source or a setting has changed since a call that was cut short; starting over",
    "resuming": "going on from the finished shards of a call that was cut short",
    "dataset": "tokenizing",
}

app = typer.Typer(no_args_is_help=True, help="Make, show and check datasets.")
app.command()(report)


@app.command()
def prepare(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Make the tokenizer and the datasets of a recipe; what is there already is kept."""
    from mpt.data.prepare import prepare as prepare_data
    from mpt.recipe.frozen import absolute
    from mpt.recipe.load import load

    recipe = absolute(load(recipe_file, overrides or []))
    with watch_progress() as watch:
        done = prepare_data(recipe, progress=watch, workers=workers)
    datasets = {f"stream {name}": dataset for name, dataset in done.streams.items()}
    if done.eval is not None:
        datasets["eval"] = done.eval
    result = {
        "tokenizer": str(done.tokenizer),
        "made": [str(path) for path in done.made],
        "skipped": done.skipped,
        "datasets": {name: _summary(dataset) for name, dataset in datasets.items()},
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    kept = "" if done.tokenizer in done.made else " (was there already)"
    typer.echo(f"{'tokenizer':16} {done.tokenizer}{kept}")
    for name, dataset in datasets.items():
        kept = "" if dataset.path in done.made else " (was there already)"
        counts = f"{len(dataset):,} samples of {dataset.sample_length:,} tokens"
        typer.echo(f"{name:16} {dataset.location}: {counts}{kept}")
        if kept == "" and dataset.about is not None and (counts_of := dataset.about.curation):
            typer.echo(f"{'':16} {_curated(counts_of)}; see mpt data report {dataset.location}")
    for why, count in done.skipped.items():
        typer.echo(f"{'skipped':16} {count:,} documents: {why}")


@app.command()
def inspect(
    path: DatasetPath,
    samples: Samples = 2,
    tokenizer: TokenizerFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what a dataset holds, and its first samples."""
    from mpt.data.dataset import open_dataset

    dataset = open_dataset(path)
    summary = _summary(dataset)
    shown = _first_samples(dataset, samples, tokenizer)
    if as_json:
        typer.echo(json.dumps({**summary, "first_samples": shown}))
        return
    for key, value in summary.items():
        typer.echo(f"{key:16} {value:,}" if isinstance(value, int) else f"{key:16} {value}")
    for number, sample in enumerate(shown):
        text = sample if isinstance(sample, str) else f"{str(sample[:SHOWN_IDS])[:-1]}, ...]"
        typer.echo(f"\n--- sample {number}\n{_printable(text)}")


@app.command()
def verify(path: DatasetPath, as_json: AsJson = False) -> None:
    """Read every shard and name each that is missing or corrupt; exit code 3 if there is one."""
    from mpt.data.dataset import content_fault, open_dataset
    from mpt.data.dataset import verify as verify_dataset
    from mpt.data.hashes import checkable_hashes, content_hash

    dataset = open_dataset(path)
    faults, content = verify_dataset(dataset), content_fault(dataset)
    unhashed = sum(not checkable_hashes(shard) for shard in dataset.shards)
    if as_json:
        result = {
            "shards": len(dataset.shards),
            "without_checkable_hash": unhashed,
            "content_sha256": content_hash(dataset.shards),
            "faults": [*faults, *([content] if content else [])],
        }
        typer.echo(json.dumps(result))
    else:
        for fault in faults:
            typer.echo(_printable(fault))
        typer.echo(f"{len(dataset.shards) - len(faults):,} of {len(dataset.shards):,} shards sound")
        if content:
            typer.echo(_printable(content))
        if unhashed:
            typer.echo(f"{unhashed:,} have no hash that can be checked: only their structure was")
    if faults or content:
        raise typer.Exit(EXIT_DATA)


def _curated(counts: dict[str, Any]) -> str:
    """Say what rules did to the documents of a dataset."""
    parts = [f"kept {counts['kept'][0]:,} of {counts['came'][0]:,} documents"]
    parts += [f"{rule} {n[0]:,}" for rule, n in counts["dropped"].items()]
    return "; dropped by ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else parts[0]


def _summary(dataset: Dataset) -> dict[str, Any]:
    """Return the counts of a dataset, then how it came to be where that is known."""
    return {
        "path": dataset.location,
        "shards": len(dataset.shards),
        "samples": len(dataset),
        "sample_length": dataset.sample_length,
        "encoding": str(dataset.shards[0].encoding),
        "bytes": sum(shard.file_bytes for shard in dataset.shards),
        "hashes": sorted({name for shard in dataset.shards for name in shard.hashes}),
        "tokens_per_byte": dataset.tokens_per_byte,
        **(asdict(dataset.about) if dataset.about else {}),
    }


def _first_samples(dataset: Dataset, count: int, tokenizer: Path | None) -> list[Any]:
    """Return samples as text, or as ids where there is no tokenizer."""
    from mpt.tokenizer import load_tokenizer

    shards = (dataset.open_shard(number) for number in range(len(dataset.shards)))
    rows = (shard.sample(row) for shard in shards for row in range(len(shard)))
    ids = [row.tolist() for row in islice(rows, count)]
    if tokenizer is None:
        return ids
    known = load_tokenizer(tokenizer)
    return [known.decode(sample) for sample in ids]


def _printable(text: str) -> str:
    """Return text that cannot steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


@contextmanager
def watch_progress() -> Iterator[Watch]:
    """Give what shows how far `prepare` is: a live line on a terminal, else a line per stage."""
    if not sys.stderr.isatty():
        yield _line_per_stage()
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("looking for documents")

        speed = Speed()

        def watch(seen: PrepareProgress) -> None:
            description = f"{STAGES[seen.stage]}: {speed.describe(seen, monotonic())}"
            display.update(task, description=description)

        yield watch


class Speed:
    """How fast `prepare` is, and how long it will take, measured within its stage."""

    def __init__(self) -> None:
        self._first: tuple[PrepareProgress, float] | None = None

    def describe(self, seen: PrepareProgress, now_s: float) -> str:
        """Return counts, MB/s of text, and the time left if the size of the source is known."""
        if self._first is None or self._first[0].stage != seen.stage:
            self._first = (seen, now_s)
        parts = [f"{seen.documents:,} documents, {seen.text_bytes / 1e6:,.1f} MB"]
        parts += [f"{seen.tokens:,} tokens"] if seen.tokens else []
        before, begun_s = self._first
        spent_s = now_s - begun_s
        if spent_s > 0 and seen.text_bytes > before.text_bytes:
            parts.append(f"{(seen.text_bytes - before.text_bytes) / 1e6 / spent_s:,.1f} MB/s")
        done = seen.read_bytes - before.read_bytes
        if spent_s > 0 and done > 0 and seen.source_bytes is not None:
            left_s = spent_s * max(0, seen.source_bytes - seen.read_bytes) / done
            parts.append(f"{timedelta(seconds=round(left_s))} left")
        return ", ".join(parts)


def _line_per_stage() -> Watch:
    said: set[str] = set()

    def watch(seen: PrepareProgress) -> None:
        if seen.stage not in said:
            said.add(seen.stage)
            print(f"mpt: {STAGES[seen.stage]}", file=sys.stderr)

    return watch
