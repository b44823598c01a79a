"""A condition on the columns of a table, in a small part of SQL, as a tree of values.

condition   = both {OR both}        both = one {AND one}
one         = NOT one | ( condition ) | COLUMN test
test        = = != <> < <= > >= VALUE | IS [NOT] NULL | [NOT] IN ( VALUE {, VALUE} )
            | [NOT] LIKE 'pattern'
COLUMN      = name | "any name" | `any name`
VALUE       = 'text', with '' for ' | number | TRUE | FALSE
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LIMIT_CHARACTERS = 4096
LIMIT_DEPTH = 32

Value = str | int | float | bool
Operator = Literal["=", "!=", "<", "<=", ">", ">="]


@dataclass(frozen=True)
class Compare:
    column: str
    operator: Operator
    value: Value


@dataclass(frozen=True)
class IsNull:
    column: str


@dataclass(frozen=True)
class IsIn:
    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Like:
    column: str
    pattern: str
    """With % for any characters, and _ for one."""


@dataclass(frozen=True)
class Not:
    inner: Predicate


@dataclass(frozen=True)
class Every:
    parts: tuple[Predicate, ...]


@dataclass(frozen=True)
class Some:
    parts: tuple[Predicate, ...]


Predicate = Compare | IsNull | IsIn | Like | Not | Every | Some

TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*')"
    r"|(?P<number>[-+]?(?:\d+\.\d*|\.?\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<quoted>\"[^\"]+\"|`[^`]+`)"
    r"|(?P<word>[^\W\d]\w*)"
    r"|(?P<sign><=|>=|!=|<>|[=<>(),])"
    r"|(?P<end>\Z)"
    r"|(?P<other>.))",
    re.DOTALL,
)
RESERVED = {"AND", "OR", "NOT", "IS", "NULL", "IN", "LIKE", "TRUE", "FALSE"}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    place: int

    @property
    def sign(self) -> str:
        """What a keyword or a sign stands for; nothing for all others."""
        upper = self.text.upper()
        if self.kind == "sign" or (self.kind == "word" and upper in RESERVED):
            return upper
        return ""


def parse_predicate(text: str) -> Predicate:
    """Return the condition that a text states.

    Raises:
        ValueError: it states none; says at which character.
    """
    if len(text) > LIMIT_CHARACTERS:
        raise ValueError(f"{len(text)} characters are more than {LIMIT_CHARACTERS}")
    return _Reader(text).whole()


def columns_of(predicate: Predicate) -> set[str]:
    """Return the columns that a condition speaks of."""
    match predicate:
        case Not(inner):
            return columns_of(inner)
        case Every(parts) | Some(parts):
            return set().union(*map(columns_of, parts))
        case _:
            return {predicate.column}


class _Reader:
    """Reads tokens from left to right, looking one ahead."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = next(self._tokens)

    def whole(self) -> Predicate:
        found = self._some(0)
        if self._next.kind != "end":
            raise self._wrong("AND, OR or the end")
        return found

    def _some(self, depth: int) -> Predicate:
        if depth > LIMIT_DEPTH:
            raise ValueError(f"nested more than {LIMIT_DEPTH} deep")
        parts = [self._every(depth)]
        while self._takes("OR"):
            parts.append(self._every(depth))
        return parts[0] if len(parts) == 1 else Some(tuple(parts))

    def _every(self, depth: int) -> Predicate:
        parts = [self._one(depth)]
        while self._takes("AND"):
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else Every(tuple(parts))

    def _one(self, depth: int) -> Predicate:
        if depth > LIMIT_DEPTH:
            raise ValueError(f"nested more than {LIMIT_DEPTH} deep")
        if self._takes("NOT"):
            return Not(self._one(depth + 1))
        if self._takes("("):
            found = self._some(depth + 1)
            self._expect(")")
            return found
        return self._test(self._column())

    def _column(self) -> str:
        token = self._next
        if token.kind == "quoted":
            self._advance()
            return token.text[1:-1]
        if token.kind != "word" or token.sign:
            raise self._wrong("the name of a column")
        self._advance()
        return token.text

    def _test(self, column: str) -> Predicate:
        operator = self._next.sign.replace("<>", "!=")
        if operator in ("=", "!=", "<", "<=", ">", ">="):
            self._advance()
            return Compare(column, operator, self._value())  # type: ignore[arg-type]
        if self._takes("IS"):
            negated = self._takes("NOT")
            self._expect("NULL")
            return Not(IsNull(column)) if negated else IsNull(column)
        negated = self._takes("NOT")
        found: Predicate
        if self._takes("IN"):
            found = IsIn(column, tuple(self._values()))
        elif self._takes("LIKE"):
            pattern = self._value()
            if not isinstance(pattern, str):
                raise ValueError(f"LIKE takes a text in '...', not {pattern!r}")
            found = Like(column, pattern)
        else:
            raise self._wrong("=, !=, <, <=, >, >=, IS, IN or LIKE")
        return Not(found) if negated else found

    def _values(self) -> Iterator[Value]:
        self._expect("(")
        yield self._value()
        while self._takes(","):
            yield self._value()
        self._expect(")")

    def _value(self) -> Value:
        token = self._next
        match token.kind, token.sign:
            case "text", _:
                value: Value = token.text[1:-1].replace("''", "'")
            case "number", _:
                digits = token.text.lstrip("+-")
                value = int(token.text) if digits.isdigit() else float(token.text)
            case _, "TRUE" | "FALSE" as word:
                value = word == "TRUE"
            case _:
                raise self._wrong("a value: 'text', a number, TRUE or FALSE")
        self._advance()
        return value

    def _takes(self, sign: str) -> bool:
        if self._next.sign != sign:
            return False
        self._advance()
        return True

    def _expect(self, sign: str) -> None:
        if not self._takes(sign):
            raise self._wrong(sign)

    def _advance(self) -> None:
        self._next = next(self._tokens)

    def _wrong(self, expected: str) -> ValueError:
        seen = repr(self._next.text) if self._next.kind != "end" else "the end"
        return ValueError(f"character {self._next.place}: expected {expected}, found {seen:.60}")


def _tokens(text: str) -> Iterator[_Token]:
    place = 0
    while True:
        match = TOKEN.match(text, place)
        assert match is not None
        assert match.lastgroup is not None
        kind = match.lastgroup
        yield _Token(kind, match[kind], match.start(kind) + 1)
        place = match.end()
