"""The rules of a recipe by name and in order, and which of them a text breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt.recipe.curate import Curate

Column = NDArray[np.float64]

EMPTY = "empty"
DECONTAMINATED = "decontaminate"
EXACT, NEAR = "exact_duplicates", "near_duplicates"


@dataclass(frozen=True)
class Rule:
    """A measure of a text, and its bounds."""

    name: str
    """As in the recipe, below `prepare.curate`."""
    measure: str
    least: float = -np.inf
    most: float = np.inf

    def broken_by(self, values: Column) -> NDArray[np.bool_]:
        """Return which values are out of bounds; a value that is a bound is within."""
        result: NDArray[np.bool_] = (values < self.least) | (values > self.most)
        return result


def rules_of(settings: Curate) -> list[Rule]:
    """Return the rules that a text is judged by alone: a text is dropped by the first it breaks."""
    return [
        Rule(EMPTY, "characters", least=1),
        *_bounds("length", asdict(settings.length)),
        *(_bounds("gopher", asdict(settings.gopher)) if settings.gopher else ()),
        *_of_c4(settings),
        *(
            Rule(f"pii.{kind}", f"pii.{kind}", most=0)
            for kind, treatment in asdict(settings.pii).items()
            if treatment == "drop"
        ),
        *([Rule(DECONTAMINATED, DECONTAMINATED, most=0)] if settings.decontaminate else ()),
    ]


def names_of(settings: Curate) -> list[str]:
    """Return the names of all rules, those on duplicates last; bit i of a verdict is the i-th."""
    names = [rule.name for rule in rules_of(settings)]
    names += [EXACT] if settings.exact_duplicates else []
    return [*names, NEAR] if settings.near_duplicates else names


def broken(
    rules: Sequence[Rule], columns: Mapping[str, Column], n_texts: int
) -> NDArray[np.uint64]:
    """Return for each text the rules it breaks, a bit for each."""
    verdicts = np.zeros(n_texts, np.uint64)
    for bit, rule in enumerate(rules):
        if rule.measure in columns:  # all but decontamination, where there is nothing yet
            breaks = rule.broken_by(columns[rule.measure])
            verdicts |= breaks.astype(np.uint64) << np.uint64(bit)
    return verdicts


def _bounds(group: str, settings: dict[str, Any]) -> Iterator[Rule]:
    for key, bound in settings.items():
        if bound is not None:
            name, measure = f"{group}.{key}", key[len("min_") :]
            at_least = key.startswith("min_")
            yield Rule(name, measure, least=bound) if at_least else Rule(name, measure, most=bound)


def _of_c4(settings: Curate) -> Iterator[Rule]:
    if settings.c4 is None:
        return
    if settings.c4.lorem_ipsum:
        yield Rule("c4.lorem_ipsum", "lorem_ipsum", most=0)
    if settings.c4.curly_bracket:
        yield Rule("c4.curly_bracket", "curly_bracket", most=0)
    if settings.c4.min_sentences is not None:
        yield Rule("c4.min_sentences", "sentences", least=settings.c4.min_sentences)
