"""`${train.steps}` inside a recipe: references to other keys, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mpt.recipe.problem import Problem
from mpt.recipe.source import MAX_TEXT, Node, Report, plain, walk

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
_REFERENCE = re.compile(rf"\$\{{({_NAME}(?:\.{_NAME})*)\}}")
_LONGEST_CHAIN = 20
_MOST_REFERENCES = 1000


def resolve(root: Node, report: Report) -> Any:
    """Return the recipe as plain dicts, lists and scalars with all references filled in.

    OmegaConf fills them in. It would also run resolvers (`${oc.env:HOME}` reads any variable
    of the machine) and has no bound on what references to references grow to, so every reference
    is checked before it sees one. References that are refused are reported and become None.
    """
    nodes = dict(walk(root))
    check = _Check(nodes, report)
    for key in nodes:
        check.cost(key)
    if check.n_references > _MOST_REFERENCES:
        report.at_value(Problem("", f"more than {_MOST_REFERENCES} references to follow."))
        return None
    values = plain(root, report.broken)
    if not check.n_references:
        return values
    from omegaconf import OmegaConf  # most recipes have no reference and need not wait for it

    resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    for key, text in _texts(resolved):
        if "${" in text:
            report.at_value(Problem(key, "its references put together make a new reference."))
            report.broken.add(key)
    return resolved


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    match value:
        case str():
            yield key, value
        case dict():
            for name, child in value.items():
                yield from _texts(child, f"{key}.{name}".removeprefix("."))
        case list():
            for i, child in enumerate(value):
                yield from _texts(child, f"{key}[{i}]")


class _Check:
    """Follows references the way OmegaConf will, and refuses those that must not reach it."""

    def __init__(self, nodes: dict[str, Node], report: Report) -> None:
        self.nodes = nodes
        self.report = report
        self.n_references = 0  # to follow in all; one to a reference counts twice
        self.costs: dict[str, tuple[int, int]] = {}

    def cost(self, key: str, trail: tuple[str, ...] = ()) -> tuple[int, int]:
        """Return how many references lie below a key, and how many characters its text has."""
        if key not in self.costs:
            text = self.nodes[key].value
            if isinstance(text, str) and "${" in text:
                self.costs[key] = self._followed(key, text, (*trail, key))
            else:
                self.costs[key] = (0, 0 if isinstance(text, dict | list) else len(str(text)))
            self.n_references += self.costs[key][0]
        return self.costs[key]

    def _followed(self, key: str, text: str, trail: tuple[str, ...]) -> tuple[int, int]:
        rest = _REFERENCE.sub("", text)
        targets = _REFERENCE.findall(text)
        refusals = [_not_plain(text)] if "${" in rest or "\\" in rest else []
        refusals += [self._refusal(target, text, trail) for target in targets]
        n_references, length = len(targets), len(rest)
        if not any(refusals):
            below = [self.cost(target, trail) for target in targets]
            n_references += sum(n for n, _ in below)
            length += sum(characters for _, characters in below)
            if length > MAX_TEXT:
                refusals.append(f"grows to more than {MAX_TEXT} characters.")
        if any(refusals):
            self.report.at_value(Problem(key, next(filter(None, refusals))))
        if any(refusals) or self.report.broken.intersection(targets):
            self.report.broken.add(key)
            return 0, 0
        return n_references, length

    def _refusal(self, target: str, text: str, trail: tuple[str, ...]) -> str:
        """Return why `target` cannot be filled in, or nothing."""
        if target in trail:
            circle = " -> ".join((*trail[trail.index(target) :], target))
            return f"the references go in a circle: {circle}."
        if len(trail) > _LONGEST_CHAIN:
            return f"a chain of more than {_LONGEST_CHAIN} references."
        if target not in self.nodes:
            return f"${{{target}}} refers to a key that this recipe does not set."
        value = self.nodes[target].value
        if isinstance(value, dict | list):
            return f"${{{target}}} is a whole section; refer to a single value."
        whole = text == f"${{{target}}}"
        if not whole and (value is None or isinstance(value, bool)):
            return f"${{{target}}} is neither text nor a number, so it cannot be part of a text."
        if value == "???":
            return f"${{{target}}} has no value yet."
        return ""


def _not_plain(text: str) -> str:
    starts = [match.start() for match in re.finditer(r"\$\{", text)]
    odd = next((text[i:] for i in starts if not _REFERENCE.match(text, i)), text)
    if named := re.match(r"\$\{\s*([A-Za-z0-9_.]+)\s*:", odd):
        return f"the resolver `{named[1]}` is off: a recipe cannot run or read anything."
    shown = odd if len(odd) <= 40 else odd[:40] + "..."
    return f"`{shown}` is not a plain reference; only `${{section.key}}` is."
