"""Reads a recipe: YAML and overrides in, one Recipe or every problem at once out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

from mpt.errors import RecipeError
from mpt.recipe import convert, interpolate, override, parse
from mpt.recipe.problem import Problem
from mpt.recipe.recipe import Recipe
from mpt.recipe.shipped import shipped_recipes
from mpt.recipe.source import Place, Report

_MAX_BYTES = 1_000_000


Check = Callable[[Recipe], Iterable[Problem]]
"""A check that needs more than the recipe, such as a file that it names."""


def load(path: Path, overrides: Sequence[str] = (), checks: Sequence[Check] = ()) -> Recipe:
    """Return the recipe in the file at `path` with `KEY=VALUE` overrides laid over it.

    Args:
        path: a YAML file.
        overrides: the last one wins.
        checks: are run with the recipe's own, so that all problems come at once.

    Raises:
        RecipeError: with one line for each problem, `file:line:column: key: what; what to do`.
    """
    return loads(_read(path), str(path), overrides, checks)


def loads(
    text: str, name: str, overrides: Sequence[str] = (), checks: Sequence[Check] = ()
) -> Recipe:
    """Return the recipe that `text` spells; `name` stands for its file in messages."""
    report = Report(name)
    try:
        root = parse.document(text, report)
    except parse.YamlError as error:
        report.add(Problem("", error.what), error.place)
        report.raise_if_any()
        raise
    root = override.apply(root, overrides, report)
    report.know(root)
    values = interpolate.resolve(root, report)
    recipe = None if values is None else convert.section(Recipe, "", values, report)
    if recipe is not None:
        found = (check(recipe) for check in (Recipe.problems, *checks))
        for problem in chain.from_iterable(found):
            report.at_value(problem)
    report.raise_if_any()
    assert recipe is not None, "a recipe is made unless there is a problem"
    return recipe


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: there is no such file.{_shipped(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: cannot be read: {why}.") from error
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{path}: more than {_MAX_BYTES} bytes; a recipe is a page or two.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8").split("\n")
        report = Report(str(path))
        what = f"the byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8."
        report.add(Problem("", what), Place(len(before), len(before[-1]) + 1))
        report.raise_if_any()
        raise


def _shipped(path: Path) -> str:
    name = path.name.removesuffix(".yaml")
    if name in shipped_recipes():
        return f" A recipe of that name is shipped: `mpt init {name}` writes it here."
    return ""
