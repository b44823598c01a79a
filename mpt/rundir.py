"""The run directory: what lies where, and what made it. The only thing that workers are told."""

from __future__ import annotations

import platform
from importlib.metadata import version

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


def versions() -> dict[str, str]:
    """Return the versions of what makes the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
