"""From plain dicts to the frozen dataclasses of a recipe, guided by their type hints alone."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mpt.recipe import scalar, unknown
from mpt.recipe.problem import Problem
from mpt.recipe.source import Report

T = TypeVar("T")

_MISFIT = object()
_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}


class _MisfitError(Exception):
    """A value that does not have the type of its key."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


def section(cls: type[T], key: str, values: dict[str, Any], report: Report) -> T | None:
    """Return the dataclass `cls` made of the values below `key`, or None if anything is wrong.

    Every problem goes to the report: unknown and missing keys, and values of a wrong type. What
    the report already calls broken is passed over in silence.
    """
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{key}.{name}".removeprefix(".")
        if name not in hints:
            report.at_key(unknown.explain(cls, path))
        elif problem := unknown.refused_value(cls, path, value):
            report.at_value(problem)
        else:
            found[name] = _checked(hints[name], path, value, report)
    for field in dataclasses.fields(cast(Any, cls)):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            path = f"{key}.{field.name}".removeprefix(".")
            report.at_value(Problem(path, "missing", "it has no default."))
    return None if report else cls(**found)


def _checked(kind: Any, path: str, value: Any, report: Report) -> Any:
    """Return the value as `kind`; None if it is not, after a word to the report."""
    if path in report.broken:
        return None
    try:
        return _typed(kind, path, value, report)
    except _MisfitError as misfit:
        report.at_value(Problem(path, misfit.what, misfit.fix))
        return None


def _typed(kind: Any, key: str, value: Any, report: Report) -> Any:
    """Return the value as `kind`; problems below a section are reported, not raised."""
    members = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    for member in members:
        if dataclasses.is_dataclass(member) and isinstance(value, dict):
            return section(cast(type, member), key, value, report)
        if get_origin(member) is dict and isinstance(value, dict):
            of = get_args(member)[1]
            return {n: _checked(of, f"{key}.{n}", v, report) for n, v in value.items()}
        if get_origin(member) is tuple and isinstance(value, list):
            kinds = get_args(member)
            if kinds[-1] is Ellipsis:
                kinds = kinds[:1] * len(value)
            if len(value) != len(kinds):
                raise _MisfitError(f"is a list of {len(value)}; it needs {len(kinds)}.")
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(_checked(of, f"{key}[{i}]", v, report) for i, (of, v) in items)
        fitted = _fitted(member, value)
        if fitted is not _MISFIT:
            return fitted
    raise _misfit(members, value)


def _fitted(kind: Any, value: Any) -> Any:
    """Return the value if it is a `kind`: exactly, but for whole numbers where floats go."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else _MISFIT
    if kind is float and type(value) in (int, float):
        with suppress(OverflowError):  # a whole number beyond what floats hold
            return _MISFIT if math.isnan(value) else float(value)
    # By exact type: to Python, True is an int.
    return value if kind in (int, bool, str, NoneType) and type(value) is kind else _MISFIT


def _misfit(members: tuple[Any, ...], value: Any) -> _MisfitError:
    words = [word for member in members for word in _words(member)]
    only_names = all(get_origin(member) is Literal for member in members)
    if only_names and len(words) > 1:
        needed = f"one of {', '.join(words)}"
    else:
        needed = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    if value is None:
        return _MisfitError(f"has no value; it needs {needed}.")
    return _MisfitError(f"{scalar.show(value)} is not {needed}.", _fix(members, value))


def _words(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [scalar.show(word) for word in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return ["a list"] if kinds[-1] is Ellipsis else [f"a list of {len(kinds)} numbers"]
    return [_IN_WORDS.get(kind, "a section of keys")]


def _fix(members: tuple[Any, ...], value: Any) -> str:
    wanted = {member for member in members if isinstance(member, type)}
    if isinstance(value, str):
        return scalar.hint(value, wanted)
    if isinstance(value, float) and int in wanted and value.is_integer():
        return f"write {int(value)}."
    if str in wanted and isinstance(value, int | float):
        return "put it in quotes if it is meant as text."
    return ""
