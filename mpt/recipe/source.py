"""Where each key of a recipe was written, and the list of all that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mpt.errors import RecipeError
from mpt.recipe.problem import Problem
from mpt.recipe.scalar import Scalar

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
MAX_NODES = 10_000
MAX_DEPTH = 50
MAX_TEXT = 4096
"""Characters of one value, interpolations filled in: the longest path a Linux kernel takes."""
_MOST_SHOWN = 100


@dataclass(frozen=True)
class Place:
    """A line and column of the file, both from 1; or the n-th override of the command line."""

    line: int
    column: int = 0
    override: str | None = None

    @property
    def order(self) -> tuple[bool, int, int]:
        return (self.override is not None, self.line, self.column)


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value whose problem has been reported, so that nothing is said twice."""


@dataclass(frozen=True)
class Node:
    """A value of the recipe as it was written: interpolations are still text."""

    value: Scalar | dict[str, Node] | list[Node] | Unreadable
    place: Place
    key_place: Place
    """Where the key of this value stands."""

    @property
    def children(self) -> dict[str, Node]:
        """The nodes right below, by what their key adds to this one's: `.lr` or `[0]`."""
        match self.value:
            case dict():
                return {f".{name}": child for name, child in self.value.items()}
            case list():
                return {f"[{i}]": child for i, child in enumerate(self.value)}
            case _:
                return {}


def walk(node: Node, key: str = "") -> Iterator[tuple[str, Node]]:
    """Yield the dotted key and the node of everything from here down; the root's key is ''."""
    yield key, node
    for step, child in node.children.items():
        yield from walk(child, (key + step).removeprefix("."))


def plain(node: Node, broken: set[str], key: str = "") -> Any:
    """Return the dicts, lists and scalars below; what is broken becomes None."""
    below = {
        step: plain(child, broken, (key + step).removeprefix("."))
        for step, child in node.children.items()
    }
    match node.value:
        case _ if key in broken:
            return None
        case dict():
            return {step.removeprefix("."): value for step, value in below.items()}
        case list():
            return list(below.values())
        case _:
            return node.value


class Report:
    """Collects every problem of one recipe with its place, to be raised once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.broken: set[str] = set()
        """Keys whose value cannot be looked at any further."""
        self._found: list[tuple[Place, Problem]] = []
        self._nodes: dict[str, Node] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def know(self, root: Node) -> None:
        """Remember where everything stands: call it when the tree is complete."""
        self._nodes = dict(walk(root))
        self.broken |= {k for k, n in self._nodes.items() if isinstance(n.value, Unreadable)}

    def add(self, problem: Problem, place: Place) -> None:
        self._found.append((place, problem))

    def at_key(self, problem: Problem) -> None:
        """Add a problem that points at the key itself."""
        self.add(problem, self._nodes[problem.key].key_place)

    def at_value(self, problem: Problem) -> None:
        """Add a problem that points at the value; if that is nowhere written, at its section."""
        key = problem.key
        if key in self._nodes:
            self.add(problem, self._nodes[key].place)
            return
        while key not in self._nodes:
            key = key.rpartition(".")[0]
        self.add(problem, self._nodes[key].key_place)

    def raise_if_any(self) -> None:
        """Raise one RecipeError that lists every problem in the order of the file."""
        if not self._found:
            return
        found = sorted(self._found, key=lambda pair: pair[0].order)
        lines = [self._line(place, problem) for place, problem in found[:_MOST_SHOWN]]
        if len(found) > _MOST_SHOWN:
            lines.append(f"{self.path}: and {len(found) - _MOST_SHOWN} problems more.")
        raise RecipeError("\n".join(lines))

    def _line(self, place: Place, problem: Problem) -> str:
        if place.override is not None:
            return printable(f"command line: {problem} (given as `{place.override[:100]}`)")
        position = f":{place.line}:{place.column}" if place.line else ""
        return printable(f"{self.path}{position}: {problem}")


def printable(text: str) -> str:
    """Return the text on one line that any terminal can show."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
