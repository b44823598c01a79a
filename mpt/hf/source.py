"""A SOURCE of the command line, a run, a checkpoint or an export, as weights or as a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpt.checkpoint.layout import model_of, newest_sound, read_manifest
from mpt.checkpoint.weights import Weights, open_weights
from mpt.hf.load import LoadedExport, build_network, check_shapes, is_exported, load_exported
from mpt.hf.tokenizer import MODEL_FILE
from mpt.recipe.model import Model
from mpt.tokenizer import load_tokenizer


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose every file was verified."""

    weights: Weights
    model: Model
    tokenizer_file: Path
    passed_over: dict[Path, list[str]]
    """Newer ones that are damaged, with what is wrong with them."""


def open_checkpoint(source: Path) -> OpenedCheckpoint:
    """Open the newest sound checkpoint of a run, or the one that `source` is.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    directory, passed_over = newest_sound(source, kinds=("weights", "tokenizer"))
    model = model_of(directory, read_manifest(directory))
    weights = open_weights(directory)
    check_shapes(weights.shapes, model, directory)
    return OpenedCheckpoint(weights, model, directory / MODEL_FILE, passed_over)


def open_source(source: Path) -> LoadedExport:
    """Load any SOURCE as a network that runs here, on the CPU in fp32."""
    if is_exported(source):
        return load_exported(source)
    opened = open_checkpoint(source)
    network = build_network(opened.model, opened.weights.read)
    return LoadedExport(network, opened.model, load_tokenizer(opened.tokenizer_file))
