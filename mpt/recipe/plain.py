"""Sections out of plain values, which may come from a stranger: JSON, not YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpt.errors import RecipeError
from mpt.recipe import convert
from mpt.recipe.curate import Curate
from mpt.recipe.model import Model
from mpt.recipe.source import MAX_DEPTH, Node, Place, Report

_NOWHERE = Place(0)


def model_from(values: Mapping[str, Any]) -> Model:
    """Return the model that `values` describe, by the same rules as a recipe's.

    Raises:
        RecipeError: with one line for each problem.
    """
    report = Report("model")
    report.know(_node({"model": dict(values)}, MAX_DEPTH))
    model = convert.section(Model, "model", dict(values), report)
    for problem in () if model is None else model.problems():
        report.at_value(problem)
    report.raise_if_any()
    assert model is not None
    return model


def curate_from(values: Mapping[str, Any]) -> Curate:
    """Return the rules that `values`, made by `asdict` of such, describe; RecipeError if none."""
    report = Report("curate")
    report.know(_node({"curate": dict(values)}, MAX_DEPTH))
    settings = convert.section(Curate, "curate", dict(values), report)
    report.raise_if_any()
    assert settings is not None
    return settings


def _node(value: Any, depth: int) -> Node:
    if depth == 0:
        raise RecipeError(f"model: is nested deeper than {MAX_DEPTH} levels.")
    if isinstance(value, dict):
        value = {str(key): _node(below, depth - 1) for key, below in value.items()}
    elif isinstance(value, list | tuple):
        value = [_node(below, depth - 1) for below in value]
    return Node(value, _NOWHERE, _NOWHERE)
