"""A condition of the recipe as pyarrow's expression over a table's columns."""

from __future__ import annotations

import operator
from typing import Any

from mpt.errors import DataError
from mpt.recipe.predicate import Compare, Every, IsIn, IsNull, Like, Not, Predicate, Some, Value

OPERATORS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def expression(predicate: Predicate, schema: Any) -> Any:
    """Return the expression that is true, false or, where SQL has it so, null for each row.

    Raises:
        DataError: a value that a column of its type cannot have.
    """
    import pyarrow.compute as pc

    match predicate:
        case Compare(column, sign, value):
            return OPERATORS[sign](pc.field(column), _scalar(value, column, schema))
        case IsNull(column):
            return pc.field(column).is_null()
        case IsIn(column, values):
            parts = [pc.field(column) == _scalar(value, column, schema) for value in values]
            return _joined(operator.or_, parts)
        case Like(column, pattern):
            return pc.match_like(pc.field(column), pattern)
        case Not(inner):
            return ~expression(inner, schema)
        case Every(parts):
            return _joined(operator.and_, [expression(part, schema) for part in parts])
        case Some(parts):
            return _joined(operator.or_, [expression(part, schema) for part in parts])


def _joined(join: Any, parts: list[Any]) -> Any:
    """Join in pairs, so that a long list makes no deep tree."""
    while len(parts) > 1:
        pairs = [join(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _scalar(value: Value, column: str, schema: Any) -> Any:
    """Return a value in the type of its column: a text may mean a day or a time."""
    import pyarrow as pa

    kind = schema.field(column).type
    try:
        if isinstance(value, str) and not pa.types.is_string(kind):
            return pa.scalar(value).cast(kind)
        if isinstance(value, bool) is not pa.types.is_boolean(kind) or (
            pa.types.is_string(kind) and not isinstance(value, str)
        ):
            raise pa.ArrowInvalid("another type")
        return pa.scalar(value)
    except pa.ArrowException as error:
        raise DataError(
            f"prepare.delta.predicate: {value!r:.80} is no value of the column {column!r}, "
            f"which holds {kind}."
        ) from error
