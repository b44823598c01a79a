"""An exported directory as a model that runs here: config, weights, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mpt.checkpoint.weights import Shape
from mpt.errors import DataError
from mpt.hf.directory import open_directory
from mpt.hf.names import check_depth, check_tensors, shapes_of
from mpt.model.network import MPT
from mpt.recipe.model import Model
from mpt.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedExport:
    network: MPT
    """On the CPU, fp32, in evaluation mode."""
    model: Model
    tokenizer: Tokenizer
    passed_over: Mapping[Path, list[str]] = field(default_factory=dict)
    """Newer checkpoints that are damaged, with what is wrong with them."""


def load_exported(directory: Path) -> LoadedExport:
    """Read a directory in Hugging Face's format; transformers is not needed.

    Raises:
        CheckpointError: if config or weights are missing, damaged, or no model of ours.
        DataError: if there is no usable tokenizer.
    """
    opened = open_directory(directory)
    tokenizer = required_tokenizer(directory, opened.tokenizer_file)
    network = build_network(opened.model, lambda name: opened.weights.read(name).float())
    return LoadedExport(network, opened.model, tokenizer)


def required_tokenizer(directory: Path, tokenizer_file: Path | None) -> Tokenizer:
    """Return the tokenizer that a directory should hold.

    Raises:
        DataError: if it has none, or none that can be used.
    """
    if tokenizer_file is None:
        raise DataError(f"{directory}: holds no tokenizer, and text cannot be read without one.")
    return load_tokenizer(tokenizer_file)


def build_network(model: Model, read: Callable[[str], Tensor]) -> MPT:
    """Return a network in evaluation mode that holds the very tensors `read(name)` returns."""
    with torch.device("meta"):
        network = MPT(model)
    network.load_state_dict({name: read(name) for name in network.state_dict()}, assign=True)
    return network.eval()


def check_shapes(found: Mapping[str, Shape], model: Model, where: Path) -> None:
    """Make sure that tensors are those of a model, by name and shape.

    Raises:
        CheckpointError: names the tensors that are missing, not known, or of another shape.
    """
    check_depth(len(found), model, where)
    check_tensors(found, shapes_of(model), where)
