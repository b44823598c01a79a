"""What a bare word in a recipe means: a small, strict part of YAML 1.2, with no surprises."""

from __future__ import annotations

import math
import re
from typing import Any

Scalar = int | float | bool | str | None

_WORDS: dict[str, Scalar] = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_LIMIT = 2**63
"""Integers beyond 64 bits mean a slip, and Python refuses to read thousands of digits at all."""
_LONGEST_INT = 26
"""Characters of the longest integer within 64 bits: a sign, 19 digits and six underscores."""
_SHOWN = 60
"""Characters of a value that a message repeats."""


def read(text: str) -> Scalar:
    """Return what an unquoted word means; whatever is not clearly a number is text.

    YAML 1.1 would read `010` as 8, `1:30` as 90, `yes` as true and `0x10` as 16. Here they stay
    text, so that the check of the types stops them with a message.
    """
    if text in _WORDS:
        return _WORDS[text]
    if infinite := _INFINITE.fullmatch(text):
        return float(f"{infinite[1]}inf")
    if _NAN.fullmatch(text):
        return math.nan
    if _INT.fullmatch(text):
        return _int(text)
    if _FLOAT.fullmatch(text):
        return _float(text)
    return text


def _int(text: str) -> int | str:
    if len(text) > _LONGEST_INT:
        return text
    value = int(text)
    return value if -_LIMIT <= value < _LIMIT else text


def _float(text: str) -> float | str:
    value = float(text)
    mantissa = re.split("[eE]", text)[0]
    vanished = value == 0 and re.search("[1-9]", mantissa) is not None
    return text if math.isinf(value) or vanished else value


def hint(text: str, wanted: set[type]) -> str:
    """Return what to write instead of `text` where one of the types `wanted` is expected."""
    if bool in wanted and text.lower() in ("true", "yes", "on", "y"):
        return "write true."
    if bool in wanted and text.lower() in ("false", "no", "off", "n"):
        return "write false."
    if not wanted & {int, float}:
        return ""
    if len(text) > _SHOWN:
        return "it has far too many digits." if re.fullmatch(r"[-+0-9_.eE]+", text) else ""
    if type(read(text)) in (int, float):
        return "it is in quotes, which make it text; drop them."
    if _INT.fullmatch(text) or _FLOAT.fullmatch(text):
        return "it is beyond what 64 bits can hold."
    if text.lower() in ("inf", "+inf", "infinity") and float in wanted:
        return "infinity is written .inf."
    return _plain_spelling(text)


def _plain_spelling(text: str) -> str:
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        return f"leading zeros are not allowed; write {int(text)}."
    if re.fullmatch(r"[-+]?0[xX][0-9a-fA-F]+|0o[0-7]+|0b[01]+", text):
        return f"write it in decimal: {int(text, 0)}."
    if re.fullmatch(r"[-+]?[0-9]+(:[0-9]+)+", text):
        return "write one plain number, without colons."
    if re.fullmatch(r"[-+]?[0-9][0-9_,]*[0-9]", text):
        return f"write {int(re.sub('[_,]', '', text))}."
    return ""


def show(value: Any) -> str:
    """Return a value as a recipe would spell it, short enough for a message."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float() if math.isinf(value) or math.isnan(value):
            return f".{value}" if value > 0 or math.isnan(value) else "-.inf"
        case str():
            return repr(value if len(value) <= _SHOWN else value[: _SHOWN - 3] + "...")
        case dict():
            return "a section of keys"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            return str(value)
