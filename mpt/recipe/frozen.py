"""A resolved recipe as bytes: written once for all processes, hashed, compared."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from mpt.errors import RecipeError, UsageError
from mpt.recipe import scalar
from mpt.recipe.data import PYTHON_STDLIB
from mpt.recipe.delta import DELTA_PREFIX
from mpt.recipe.load import loads
from mpt.recipe.recipe import Recipe
from mpt.storage import atomic_write

_HEAD = "# The recipe of this run, resolved. Every process reads it; change it with `mpt resume`.\n"


def freeze(recipe: Recipe, path: Path) -> None:
    """Write the recipe, with absolute paths, so that `load(path)` gives it back exactly.

    The file is complete or not there: it is written beside `path` and renamed.
    """
    recipe = absolute(recipe)
    text = _HEAD + to_yaml(recipe)
    try:
        read_back = loads(text, str(path))
    except RecipeError as error:
        raise UsageError(f"{path}: this recipe cannot be frozen: {error}") from error
    if changed := differences(recipe, read_back):
        raise UsageError(f"{path}: cannot be frozen: {', '.join(changed)} would change.")
    try:
        atomic_write(path, text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}.") from error


def absolute(recipe: Recipe) -> Recipe:
    """Return the recipe with every path that is no URL made absolute, `~` included."""
    data = recipe.data
    streams = {n: replace(s, path=_absolute(s.path)) for n, s in data.streams.items()}
    held_out = data.eval and replace(data.eval, path=_absolute(data.eval.path))
    cache = replace(data.cache, dir=_absolute(data.cache.dir))
    prepare = recipe.prepare
    if prepare is not None and prepare.source != PYTHON_STDLIB:
        prepare = replace(prepare, source=_absolute_source(prepare.source))
    if prepare is not None and prepare.curate and (wanted := prepare.curate.decontaminate):
        against = tuple(map(_absolute_source, wanted.against))
        curate = replace(prepare.curate, decontaminate=replace(wanted, against=against))
        prepare = replace(prepare, curate=curate)
    begins = recipe.train.init_from
    return replace(
        recipe,
        train=replace(recipe.train, init_from=begins and _absolute(begins)),
        tokenizer=replace(recipe.tokenizer, path=_absolute(recipe.tokenizer.path)),
        data=replace(data, streams=streams, eval=held_out, cache=cache),
        prepare=prepare,
    )


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256, in hex, of everything the recipe says, defaults included."""
    text = json.dumps(asdict(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[object, object]]:
    """Return the dotted keys whose values differ, each with both; None where there is none."""
    before, after = dict(_flat(asdict(old))), dict(_flat(asdict(new)))
    pairs = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML that our own strict reading of scalars reads back exactly."""
    # A line is as long as it needs to be: a folded path is hard to read.
    return yaml.dump(asdict(recipe), Dumper=_Dumper, sort_keys=False, width=1 << 20)


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, with quotes where *our* reader would take a text for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if scalar.read(text) == text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _list(dumper: yaml.SafeDumper, items: tuple[object, ...]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(tuple, _list)


def _absolute_source(source: str) -> str:
    prefix = DELTA_PREFIX if source.startswith(DELTA_PREFIX) else ""
    return prefix + _absolute(source.removeprefix(prefix))


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _flat(values: dict[str, Any], above: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{above}{name}.")
        else:
            pairs.append((above + name, value))
    return pairs
