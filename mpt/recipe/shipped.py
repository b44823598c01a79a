"""The recipes that travel with the package."""

from __future__ import annotations

from importlib import resources


def shipped_recipes() -> dict[str, str]:
    """Return the text of each shipped recipe, by name."""
    found = (file for file in resources.files("mpt.recipes").iterdir())
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(found, key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }
