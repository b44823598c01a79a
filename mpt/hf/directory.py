"""A directory in Hugging Face's format, which may come from a stranger, as weights of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mpt.checkpoint.weights import Piece, Weights, gather, pieces_in
from mpt.errors import CheckpointError
from mpt.hf.names import Architecture, Part, check_depth, check_tensors, names_there
from mpt.hf.understand import model_from_config
from mpt.recipe.model import Model
from mpt.storage import read_json
from mpt.tokenizer import tokenizer_file_in

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"

_CONFIG_LIMIT_BYTES = 1 << 20
_INDEX_LIMIT_BYTES = 1 << 26
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADS = {"mpt": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}
_BLOCK_ROWS = 4096
"""Rows compared at a time."""


@dataclass(frozen=True)
class Opened:
    """Such a directory, its tensors by the names they have here; nothing of them is read yet."""

    architecture: Architecture
    model: Model
    weights: Weights
    tokenizer_file: Path | None
    ignored: tuple[str, ...]
    """Tensors that are there and say nothing: buffers, a second copy of the embedding."""


def is_exported(directory: Path) -> bool:
    """Tell a directory in Hugging Face's format from a run or a checkpoint."""
    return (directory / CONFIG).is_file()


def open_directory(directory: Path) -> Opened:
    """Read what a directory says of its model, and make sure that its tensors are all there.

    Which file holds a tensor is taken from the files themselves: the index could lead anywhere.
    Links are followed, for a cache of the hub is made of them.

    Raises:
        CheckpointError: if config or weights are missing, damaged, pickled or no model of ours.
    """
    path = directory / CONFIG
    config = read_json(path, limit_bytes=_CONFIG_LIMIT_BYTES, error=CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a mapping.")
    try:
        architecture, model = model_from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}/{error}") from error
    pieces = _pieces(directory)
    check_depth(len(pieces), model, directory)
    ignored = tuple(sorted(_to_ignore(pieces, architecture, model)))
    kept = {key: piece for key, piece in pieces.items() if key not in ignored}
    parts = names_there(model, architecture)
    shapes = {key: piece.shape for key, piece in kept.items()}
    check_tensors(shapes, {key: part.shape for key, part in parts.items()}, directory)
    weights = gather(directory, ((parts[key].name, _placed(kept[key], parts[key])) for key in kept))
    return Opened(architecture, model, weights, tokenizer_file_in(directory), ignored)


def _placed(piece: Piece, part: Part) -> Piece:
    return replace(piece, offset=(part.start, *(0 for _ in part.shape[1:])))


def _pieces(directory: Path) -> dict[str, Piece]:
    """Return all tensors of a directory by the names they have there."""
    files = [path for path in sorted(directory.glob(WEIGHTS)) if path.is_file()]
    if not files:
        raise CheckpointError(_why_no_weights(directory))
    index = directory / INDEX
    if index.is_file():
        _check_index(index, {path.name for path in files})
    found: dict[str, Piece] = {}
    for path in files:
        for piece in pieces_in(path):
            if piece.key in found:
                raise CheckpointError(f"{path}: {piece.key} is also in {found[piece.key].file}.")
            found[piece.key] = piece
    return found


def _why_no_weights(directory: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return f"{directory}: no weights there; they are looked for as {WEIGHTS}."
    return (
        f"{directory}: {', '.join(pickles[:3])}: a pickle can run any program as it is read, so "
        "none is read here. Turn it into safetensors where that may happen, for instance with "
        "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)` of transformers."
    )


def _check_index(index: Path, there: set[str]) -> None:
    """Make sure that an index names files of its directory only, and all of them are there."""
    content = read_json(index, limit_bytes=_INDEX_LIMIT_BYTES, error=CheckpointError)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict):
        raise CheckpointError(f"{index}: has no weight_map.")
    absent = sorted({str(name) for name in table.values()} - there)
    if absent:
        raise CheckpointError(f"{index}: names {absent[0]!r}, which is no file of this directory.")


def _to_ignore(pieces: dict[str, Piece], architecture: Architecture, model: Model) -> Iterator[str]:
    """Yield the tensors that older versions wrote although they follow from the rest."""
    yield from (key for key in pieces if key.endswith(".rotary_emb.inv_freq"))
    head, embedding = pieces.get("lm_head.weight"), pieces.get(_HEADS[architecture])
    if not model.tie_word_embeddings or head is None or embedding is None:
        return
    if not _equal(head, embedding):
        raise CheckpointError(
            f"{head.file}: lm_head.weight is not the embedding, which config.json says it is: "
            "tie_word_embeddings is true. If the head is its own, make that false."
        )
    yield "lm_head.weight"


def _equal(one: Piece, other: Piece) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype) or len(one.shape) != 2:
        return False
    pair = gather(one.file.parent, [("one", one), ("other", other)])
    blocks = (
        (start, min(start + _BLOCK_ROWS, one.shape[0]))
        for start in range(0, one.shape[0], _BLOCK_ROWS)
    )
    return all(bool((pair.read("one", rows) == pair.read("other", rows)).all()) for rows in blocks)
