"""`mpt data report`: one page on what is in a dataset, or on what rules would do to a source."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpt.errors import UsageError

from . import render

if TYPE_CHECKING:
    from mpt.recipe.recipe import Recipe

Target = Annotated[
    str,
    typer.Argument(help="A prepared dataset, a recipe, or a source of text.", metavar="TARGET"),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe keys to change.", metavar="[KEY=VALUE]...")
]
Sample = Annotated[str, typer.Option(help="Share of a source's documents to look at: 1%, or 0.01.")]
Out = Annotated[Path, typer.Option(help="The HTML page to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the numbers instead; write no page.")]

_SHARE = re.compile(r"([0-9]*\.?[0-9]+)(%?)")


def report(
    target: Target,
    overrides: Overrides = None,
    sample: Sample = "100%",
    out: Out = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write one HTML page: what came in, what each rule drops, lengths, duplicates, tokens.

    Of a prepared dataset, what its preparation counted. Of a recipe, what its rules would do to its
    source, or where it names none, and of a source, what all of them would; nothing else is
    written.
    """
    from mpt.data.curate.page import page
    from mpt.data.descriptions import ABOUT_NAME
    from mpt.data.index import has_index
    from mpt.storage import atomic_write, without_secrets

    share, name = _share(sample), without_secrets(target)
    if not as_json:
        _refuse_to_replace(out)
    if has_index(Path(target)) and (Path(target) / ABOUT_NAME).is_file():
        if share != 1.0 or overrides:
            raise UsageError(f"{name}: is prepared; a sample or overrides are of a source.")
        account, facts, would = *_prepared(Path(target)), False
    else:
        account, facts, would = *_assessed(target, overrides or [], share), True
    if as_json:
        typer.echo(json.dumps({"target": name, "would": would, "facts": facts, **account}))
        return
    atomic_write(out, page(name, account, facts, would=would))
    typer.echo(str(out))


def _refuse_to_replace(out: Path) -> None:
    """Refuse to write over a file that is no page: a recipe, say."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: not a file in a directory that is there.")
    if out.exists():
        with out.open("rb") as file:
            if not file.read(15).lower().startswith(b"<!doctype html"):
                raise UsageError(f"--out {out}: is there, and no report; name another file.")


def _share(text: str) -> float:
    found = _SHARE.fullmatch(text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--sample {text!r}: not a share; write 1%, or 0.01.")
    return share


def _prepared(directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from mpt.data.curate.account import read_account
    from mpt.data.dataset import open_dataset

    dataset = open_dataset(directory)
    account = read_account(directory)
    about = dataset.about
    facts = {
        "dataset": f"{len(dataset):,} samples of {dataset.sample_length:,} tokens, "
        f"{len(dataset.shards):,} shards",
        "index.json": f"sha256 {dataset.index_sha256}",
    }
    if about is not None:
        facts |= {
            "source": about.source,
            "split": about.split,
            "tokenizer": f"sha256 {about.tokenizer_sha256}",
            "dropped at the end": f"{about.dropped_tokens:,} tokens that filled no sample",
            "made by": about.created_by,
        }
    return account, facts


def _assessed(
    target: str, overrides: list[str], share: float
) -> tuple[dict[str, Any], dict[str, str]]:
    from mpt.data.curate.assess import assess
    from mpt.data.source import find_source
    from mpt.storage import without_secrets
    from mpt.tokenizer import load_tokenizer

    recipe = _recipe(target, overrides)
    if recipe is None:
        source, tokenizer = find_source(target), None
    else:
        assert recipe.prepare is not None
        given = recipe.prepare
        source = find_source(given.source, given.text_key, given.delta, recipe.data.cache)
        path = Path(recipe.tokenizer.path)
        tokenizer = load_tokenizer(path) if path.is_file() else None
    section = recipe.prepare if recipe else None
    found = assess(
        source,
        settings=section.curate if section else None,
        eval_fraction=section.eval_fraction if section and recipe and recipe.data.eval else 0.0,
        tokenizer=tokenizer,
        sample=share,
    )
    facts = {
        "source": without_secrets(source.location),
        "sample": f"{share:.4g} of the documents, by a hash of their text"
        + ("" if share == 1 else "; of near duplicates it finds only those within it"),
        "rules": "the recipe's" if found.chosen else "none are chosen, so all were tried",
        "tokenizer": f"sha256 {tokenizer.sha256}" if tokenizer else "none is there yet",
    }
    facts |= {f"skipped: {why}": f"{count:,}" for why, count in found.skipped.items()}
    if not found.chosen:
        render.tell("no rules are chosen, so all of them were tried, with their papers' values.")
    return found.account, facts


def _recipe(target: str, overrides: list[str]) -> Recipe | None:
    """Return the recipe that a target is, or None if it is a source."""
    from mpt.recipe.frozen import absolute
    from mpt.recipe.load import load
    from mpt.storage import without_secrets

    if Path(target).suffix not in (".yaml", ".yml") or not Path(target).is_file():
        if overrides:
            raise UsageError(
                f"{without_secrets(target)}: not a recipe, so it has no keys to change."
            )
        return None
    recipe = absolute(load(Path(target), overrides))
    if recipe.prepare is None:
        raise UsageError(f"{target}: has no `prepare:` section, so there is no source to read.")
    return recipe
