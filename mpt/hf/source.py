"""A SOURCE of the command line, a run, a checkpoint or an export, as weights or as a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpt.checkpoint.layout import model_of, newest_sound, read_manifest
from mpt.checkpoint.weights import Weights, open_weights
from mpt.hf.directory import is_exported, open_directory
from mpt.hf.load import (
    LoadedExport,
    build_network,
    check_shapes,
    load_exported,
    required_tokenizer,
)
from mpt.recipe.model import Model
from mpt.tokenizer import tokenizer_file_in


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose every file was verified, or an export, which has no hashes."""

    weights: Weights
    model: Model
    tokenizer_file: Path | None
    passed_over: dict[Path, list[str]]
    """Newer ones that are damaged, with what is wrong with them."""


def open_checkpoint(source: Path) -> OpenedCheckpoint:
    """Open the newest sound checkpoint of a run, or the checkpoint or export that `source` is.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    if is_exported(source):
        opened = open_directory(source)
        return OpenedCheckpoint(opened.weights, opened.model, opened.tokenizer_file, {})
    directory, passed_over = newest_sound(source, kinds=("weights", "tokenizer"))
    model = model_of(directory, read_manifest(directory))
    weights = open_weights(directory)
    check_shapes(weights.shapes, model, directory)
    return OpenedCheckpoint(weights, model, tokenizer_file_in(directory), passed_over)


def open_source(source: Path) -> LoadedExport:
    """Load any SOURCE as a network that runs here, on the CPU in fp32."""
    if is_exported(source):
        return load_exported(source)
    opened = open_checkpoint(source)
    tokenizer = required_tokenizer(opened.weights.directory, opened.tokenizer_file)
    network = build_network(opened.model, lambda name: opened.weights.read(name).float())
    return LoadedExport(network, opened.model, tokenizer, opened.passed_over)
