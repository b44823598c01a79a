"""What to say of a key that its section does not have: a slip, another section's, or MPT's."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mpt.recipe.model import Model
from mpt.recipe.problem import Problem
from mpt.recipe.recipe import Recipe
from mpt.recipe.refused import REFUSED, REFUSED_VALUES
from mpt.recipe.scalar import show


def refused_value(cls: type, path: str, value: Any) -> Problem | None:
    """Return why a value that MPT has elsewhere is not built here, if it is one."""
    refused = REFUSED_VALUES.get(_name(path), {}) if cls is Model else {}
    if not isinstance(value, str) or value not in refused:
        return None
    return Problem(path, f"{show(value)} {refused[value]}")


def explain(cls: type, path: str) -> Problem:
    """Return what is wrong with a key that means nothing in its section, and what was meant."""
    name = _name(path)
    if cls is Model and name in REFUSED:
        return Problem(path, REFUSED[name])
    elsewhere = [f"`{section}:`" for section in _homes().get(name, [])]
    if elsewhere:
        return Problem(path, "unknown key here", f"`{name}` belongs to {' or '.join(elsewhere)}.")
    here = _keys(cls)
    if close := difflib.get_close_matches(name, here, n=1):
        return Problem(path, "unknown key", f"did you mean `{close[0]}`?")
    if close := difflib.get_close_matches(name, _homes(), n=1, cutoff=0.8):
        home = _homes()[close[0]][0]
        return Problem(path, "unknown key", f"did you mean `{close[0]}` in `{home}:`?")
    return Problem(path, "unknown key", f"the keys here are {', '.join(sorted(here))}.")


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _keys(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


@functools.cache
def _homes() -> dict[str, list[str]]:
    """Return for each key of any section the sections that have it."""
    homes: dict[str, list[str]] = {}
    for section, keys in _sections(Recipe):
        for key in keys:
            homes.setdefault(key, []).append(section)
    return homes


def _sections(cls: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the dotted name and the keys of each section below `cls`."""
    for name, kind in get_type_hints(cls).items():
        below = f"{path}.{name}".removeprefix(".")
        for member in get_args(kind) if get_origin(kind) is UnionType else (kind,):
            if dataclasses.is_dataclass(member):
                yield below, _keys(member)
                yield from _sections(member, below)
            elif get_origin(member) is dict:
                yield f"{below}.NAME", _keys(get_args(member)[1])
