"""How a new run begins: at random, or with the weights of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpt.checkpoint.layout import Kind, newest_sound
from mpt.checkpoint.tensors import kind_of, read_tensors
from mpt.checkpoint.weights import open_weights
from mpt.display import Display
from mpt.dist import Ranks, bytes_from_first
from mpt.errors import CheckpointError
from mpt.launch.attempt import this_attempt
from mpt.log import Journal

_MOST_SHOWN = 8
"""Tensors of another shape that an error names."""


def begin_with(
    source: str | None,
    tensors: Mapping[str, Tensor],
    ranks: Ranks,
    journal: Journal,
    display: Display,
) -> None:
    """Fill the weights from another run's checkpoint; moments stay as they are, zero.

    Args:
        source: a checkpoint, or a run, whose newest sound one is taken; None: nothing is done.

    Raises:
        CheckpointError: if there is none that is whole, or its tensors are not of these shapes.
    """
    if source is None:
        return
    # By the first rank alone, and nothing is set aside: the directory is somebody else's.
    found = json.loads(bytes_from_first(_sound(Path(source)) if ranks.is_first else b""))
    if "error" in found:
        raise CheckpointError(found["error"])
    directory = Path(found["directory"])
    weights = {name: t for name, t in tensors.items() if kind_of(name) == "weights"}
    _check_shapes(weights, directory)
    read_tensors(weights, directory)
    if ranks.is_first:
        for damaged in found["passed_over"]:
            display.note(f"{damaged} is damaged and was passed over.", "red")
        journal.event("begun_from", attempt=this_attempt(), path=str(directory))
        display.note(f"begins with the weights of {directory}")


def _check_shapes(weights: Mapping[str, Tensor], directory: Path) -> None:
    shapes = open_weights(directory).shapes
    wanted = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = [
        f"{name} is {shapes.get(name, 'missing')} there and {wanted.get(name, 'not known')} here"
        for name in sorted(shapes.keys() | wanted.keys())
        if shapes.get(name) != wanted.get(name)
    ]
    if differing:
        shown = "; ".join(differing[:_MOST_SHOWN])
        raise CheckpointError(
            f"{directory}: {len(differing)} of its tensors are not of the recipe's model: {shown}."
        )


def _sound(source: Path) -> bytes:
    """Return, as JSON, the newest sound checkpoint there, or what is wrong."""
    kinds: tuple[Kind, ...] = ("weights",)
    try:
        directory, passed_over = newest_sound(source.absolute(), kinds)
    except CheckpointError as error:
        return json.dumps({"error": str(error)}).encode()
    found = {"directory": str(directory), "passed_over": [str(path) for path in passed_over]}
    return json.dumps(found).encode()
