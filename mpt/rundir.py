"""The run directory: what lies where, and what made it. The only thing that workers are told."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpt.errors import DataError
from mpt.storage import read_json

RECIPE = "recipe.yaml"
"""The resolved recipe, the one that workers read."""
RECIPE_SOURCE = "recipe.source.yaml"
"""The recipe as the user wrote it."""
PROVENANCE = "provenance.json"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
CHOSEN = "chosen.json"
"""What `auto` came to, by machine and number of workers."""
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LEDGER = "ledger.jsonl"
"""What was skipped: a line for each update left out, and for each window of data passed over."""
LOCK = "lock"

_PACKAGES = ("mpt-train", "torch", "safetensors", "sentencepiece", "numpy")


CHOSEN_FORMAT = 1
_CHOSEN_LIMIT_BYTES = 1 << 20


def read_chosen(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of `chosen.json`; none where there is none that can be read."""
    try:
        raw = read_json(run_dir / CHOSEN, limit_bytes=_CHOSEN_LIMIT_BYTES)
    except DataError:
        return []
    ours = isinstance(raw, dict) and raw.get("format") == CHOSEN_FORMAT
    entries = raw.get("choices") if ours else None
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def versions() -> dict[str, str]:
    """Return the versions of what makes the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
