"""What a choice hangs on, so that it is known when it holds again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

from mpt.recipe.activations import Attention, Precision, Recompute
from mpt.recipe.attention import Choice
from mpt.recipe.fit import Fit
from mpt.recipe.float8 import Float8
from mpt.recipe.machine import Machine
from mpt.recipe.recipe import Recipe
from mpt.recipe.room import GradientReduction, share_of

_SWITCHES = (
    "microbatch_size",
    "precision",
    "attention",
    "activation_checkpointing",
    "compile",
    "reshard_after_forward",
    "replicas",
    "float8",
)
"""Keys of `train:` that a choice hangs on, beside how much there is to do."""


def premises(recipe: Recipe, machine: Machine, world_size: int) -> dict[str, Any]:
    """Return all that a choice hangs on, as JSON values: where they are equal, so is the choice.

    What torch or a driver is like is not among them: they may make another size the fastest, but a
    run goes on as it began.
    """
    train = recipe.train
    asked = {key: getattr(train, key) for key in ("steps", "global_batch_size", *_SWITCHES)}
    model = json.dumps(asdict(recipe.model), sort_keys=True).encode()
    return {
        "world_size": world_size,
        "machine": machine.to_json(),
        "train": asked,
        "optimizer": recipe.optimizer.name,
        "model_sha256": hashlib.sha256(model).hexdigest(),
    }


def recalled(estimate: Fit, chosen: Any, recipe: Recipe, world_size: int) -> Fit:
    """Return the choice that `to_json` gave, on premises like those of `estimate`.

    Raises:
        ValueError: if it is none; it may have been through a stranger's hands.
    """
    if not isinstance(chosen, Mapping) or set(chosen) != set(estimate.to_json()):
        raise ValueError("not a choice")
    names: dict[str, Sequence[Any]] = {
        "precision": get_args(Precision),
        "attention": get_args(Attention),
        "recompute": get_args(Recompute),
        "reduce_gradients": get_args(GradientReduction),
        "float8": get_args(Float8),
        "compile": (True, False),
        "reshard_after_forward": (True, False),
        "microbatch_size": range(1, share_of(recipe, world_size) + 1),
        "replicas": [n for n in range(1, world_size + 1) if world_size % n == 0],
    }
    for key, allowed in names.items():
        if type(chosen[key]) is not type(allowed[0]) or chosen[key] not in allowed:
            raise ValueError(f"{key} is {chosen[key]!r}")
    for key, mine in estimate.to_json().items():
        asked = getattr(
            recipe.train, {"recompute": "activation_checkpointing"}.get(key, key), "auto"
        )
        if asked != "auto" and chosen[key] != mine:
            raise ValueError(f"{key} is {chosen[key]!r}, which is not what the recipe says")
    attention = Choice(chosen["attention"], "as before")
    if attention.backend == estimate.attention.backend:
        attention = estimate.attention
    return replace(estimate, **{**chosen, "attention": attention})
