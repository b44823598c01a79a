"""Prompts from a file: a line each, or JSON lines where a prompt has lines of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mpt.errors import DataError

STDIN = Path("-")


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file, or on standard input if `path` is `-`.

    Blank lines are passed over. It is a file of JSON lines, `{"prompt": "..."}` each, if it is
    called *.jsonl, or if the first of its lines is such an object; then all must be.

    Raises:
        DataError: if the file cannot be read, holds no prompt, or a line of JSON is no prompt.
    """
    try:
        data = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        text = data.decode()
    except OSError as error:
        raise DataError(f"{path}: no prompts can be read here: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text, at byte {error.start:,}.") from error
    # Not splitlines: a line may hold what Unicode has for line ends of its own.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: holds no prompt; give one a line.")
    if path.suffix != ".jsonl" and _prompt_of(numbered[0][1]) is None:
        return [line for _, line in numbered]
    return [_required(path, number, line) for number, line in numbered]


def _required(path: Path, number: int, line: str) -> str:
    if (prompt := _prompt_of(line)) is None:
        raise DataError(f'{path}:{number}: is not an object such as {{"prompt": "some text"}}.')
    return prompt


def _prompt_of(line: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    return prompt if isinstance(prompt, str) else None
