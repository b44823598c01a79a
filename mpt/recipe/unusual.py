"""The options at which a model is not as MPT was released: what a reader of a plan must know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import yaml

from mpt.recipe.model import Model

_SAME_AS = {
    "attn_type": "n_kv_heads",
    "ffn_hidden_size": "ffn_width",
    "head_dim": "head_width",
    "kv_n_heads": "n_kv_heads",
}
"""Keys that may spell out what follows anyway, and where to see what does."""


def unusual(model: Model) -> list[str]:
    """Return the options with another value than MPT was released with, each as `key: value`.

    Sizes are no options. In sections below, only keys that differ are named, with dots.
    """
    usual = Model(
        d_model=model.d_model,
        n_heads=model.n_heads,
        n_layers=model.n_layers,
        max_seq_len=model.max_seq_len,
        vocab_size=model.vocab_size,
    )
    spelled_out = {
        key for key, seen in _SAME_AS.items() if getattr(model, seen) == getattr(usual, seen)
    }
    found = _differences(asdict(model), asdict(usual))
    return [f"{key}: {_show(value)}" for key, value in found if key not in spelled_out]


def _differences(
    values: dict[str, Any], usual: dict[str, Any], above: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(usual[key], dict):
            yield from _differences(value, usual[key], f"{above}{key}.")
        elif value != usual[key]:
            yield f"{above}{key}", value


def _show(value: Any) -> str:
    """As it would be written in a recipe, on one line."""
    text = yaml.safe_dump(_bare(value), default_flow_style=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")


def _bare(value: Any) -> Any:
    """Without what says nothing: keys that are null."""
    if isinstance(value, dict):
        return {key: _bare(below) for key, below in value.items() if below is not None}
    return [_bare(below) for below in value] if isinstance(value, list | tuple) else value
