"""`key=value` from the command line: laid over the recipe before anything is checked."""

from __future__ import annotations

from collections.abc import Sequence

from mpt.recipe import parse
from mpt.recipe.problem import Problem
from mpt.recipe.source import KEY, MAX_DEPTH, MAX_NODES, Node, Place, Report, walk


def apply(root: Node, overrides: Sequence[str], report: Report) -> Node:
    """Return the tree with every override in its place; later ones win."""
    for number, text in enumerate(overrides, start=1):
        place = Place(number, override=text)
        key, equals, value = (part.strip() for part in text.partition("="))
        if refusal := _refusal(key, equals, value):
            report.add(refusal, place)
            continue
        try:
            new = parse.value(value, key, place, report)
            root = _with(root, key.split("."), new, place)
        except parse.YamlError as error:
            report.add(Problem(key, error.what), place)
    if sum(1 for _ in walk(root)) > MAX_NODES:
        place = Place(len(overrides), override=overrides[-1])
        report.add(Problem("", f"more than {MAX_NODES} values with the overrides."), place)
    return root


def _refusal(key: str, equals: str, value: str) -> Problem | None:
    if key.startswith(("+", "~")):
        return Problem(
            "",
            f"`{key[0]}` is not part of an override here.",
            "write KEY=VALUE; it sets a key whether the file has it or not.",
        )
    if not equals:
        return Problem("", "is not KEY=VALUE.", "write it like `train.steps=100`.")
    parts = key.split(".")
    if not all(KEY.fullmatch(part) for part in parts) or len(parts) > MAX_DEPTH:
        return Problem(
            "",
            "its left side is not a dotted key.",
            "write it like `optimizer.lr=1e-3`; a list is set whole, `optimizer.betas=[0.9,0.95]`.",
        )
    if not value:
        return Problem(key, "the value is missing.", f"write {key}=VALUE, or null for none.")
    return None


def _with(node: Node, path: Sequence[str], new: Node, place: Place) -> Node:
    """Return the node with `new` at `path` below it; aliased parts elsewhere stay as they are."""
    if node.value is None:
        node = Node({}, place, node.key_place)
    if not isinstance(node.value, dict):
        raise parse.YamlError(place, f"there is no `{path[0]}` below a value that has no keys.")
    name, *rest = path
    if rest:
        new = _with(node.value.get(name, Node({}, place, place)), rest, new, place)
    return Node({**node.value, name: new}, node.place, node.key_place)
