"""A checkpoint's weights as a Hugging Face model directory that has proved itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mpt.checkpoint.layout import MANIFEST
from mpt.checkpoint.stream import SHARD_BYTES
from mpt.checkpoint.weights import Weights
from mpt.errors import DataError, UsageError
from mpt.hf.card import CARD_FILE, Provenance, is_card, model_card, provenance_of
from mpt.hf.config import config_json, expressible
from mpt.hf.directory import CONFIG, INDEX, is_exported
from mpt.hf.load import check_shapes
from mpt.hf.names import Architecture, names_there
from mpt.hf.prove import Proof, prove
from mpt.hf.shards import write_shards
from mpt.hf.tokenizer import write_tokenizer
from mpt.recipe.model import Model
from mpt.storage import fsync_dir
from mpt.tokenizer import CONFIG_FILE, JSON_FILE, MODEL_FILE, load_tokenizer

if TYPE_CHECKING:
    from mpt.hf.gguf_proof import GgufProof

Dtype = Literal["fp32", "bf16", "fp16"]

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_GENERATION = "generation_config.json"
_OURS = {CONFIG, _GENERATION, INDEX, JSON_FILE, CONFIG_FILE, MODEL_FILE}


@dataclass(frozen=True)
class Exported:
    """What was written, and what was proved of it."""

    directory: Path
    files: tuple[str, ...]
    bytes: int
    dtype: Dtype
    proof: Proof | GgufProof | None
    """None: transformers is not installed, so that nothing was proved. Say so loudly."""
    notes: tuple[str, ...]
    """What a user should know about the export, a sentence each."""

    @property
    def proved(self) -> bool:
        return self.proof is not None


def export(
    weights: Weights,
    model: Model,
    tokenizer_file: Path | None,
    out_dir: Path,
    *,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    proof_bytes: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `out_dir` as a model that transformers loads by itself: whole, proved, or not at all.

    No more of the weights is in memory than one tensor, but for the proof.

    Args:
        tokenizer_file: without one, no tokenizer is written.
        dtype: of the stored weights. None keeps the checkpoint's own, so that nothing is
            lost unasked; bf16 and fp16 halve the files of fp32, and round.
        shard_bytes: most bytes of a weight file; a tensor that is larger has a file to itself.
        proof_bytes: of a network that is larger than this in fp32, only the first blocks are
            asked for logits. None: as much as two weight files may have.
        overwrite: replace an earlier export in `out_dir`.

    Raises:
        UsageError: if `out_dir` is taken, or transformers would not compute this model.
        CheckpointError: if the weights are not those of `model`, or not finite as `dtype`.
        DataError: if the tokenizer cannot be used, or has more ids than the model.
        ExportError: if transformers does not give our logits and ids. No `out_dir` is left.
    """
    out_dir = out_dir.resolve()
    refuse_taken(out_dir, overwrite)
    check_shapes(weights.shapes, model, weights.directory)
    eod_id = None if tokenizer_file is None else eod_of(tokenizer_file, model)
    stored = dtype or stored_dtype(weights)
    config = config_json(model, dtype=_in_torch(stored), eod_id=eod_id)
    architecture, _ = expressible(model)
    assert architecture is not None  # config_json has seen to it
    rounded = None if dtype is None else TORCH_DTYPES[dtype]
    with _whole_or_absent(out_dir) as partial:
        _write_json(partial / CONFIG, config)
        _write_json(partial / _GENERATION, _generation_config(eod_id))
        parts = names_there(model, architecture)
        if index := write_shards(partial, weights, parts, rounded, shard_bytes):
            _write_json(partial / INDEX, index)
        if tokenizer_file is not None:
            write_tokenizer(tokenizer_file, partial, max_length=model.max_seq_len)
        most = 2 * shard_bytes if proof_bytes is None else proof_bytes
        proof = prove(partial, weights, model, tokenizer_file, architecture, rounded, most)
        said = "Nothing: transformers was not installed." if proof is None else str(proof)
        card = card_of(weights, model, format=architecture, dtype=stored, proof=said)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
    files = sorted(out_dir.iterdir())
    names, n_bytes = tuple(p.name for p in files), sum(p.stat().st_size for p in files)
    notes = tuple(_notes(weights, model, architecture, eod_id))
    return Exported(out_dir, names, n_bytes, stored, proof, notes)


def card_of(weights: Weights, model: Model, proof: str, *, format: str, dtype: Dtype) -> str:
    """Return the model card of an export."""
    directory = weights.directory
    if (directory / MANIFEST).is_file():
        about = provenance_of(directory)
    else:
        source = directory.resolve().name if is_exported(directory) else None
        about = Provenance(datasets={}, versions={}, imported_from=source)
    return model_card(model, about, format=format, dtype=dtype, proof=proof)


def stored_dtype(weights: Weights) -> Dtype:
    """Return what all tensors as they are stored fit into."""
    found = {weights.dtype(name) for name in weights.shapes}
    widest = found.pop() if len(found) == 1 else torch.float32
    return next(name for name, dtype in TORCH_DTYPES.items() if dtype == widest)


def _in_torch(dtype: Dtype) -> str:
    return str(TORCH_DTYPES[dtype]).removeprefix("torch.")


def refuse_taken(out_dir: Path, overwrite: bool) -> None:
    """Make sure that an export may have a name.

    Raises:
        UsageError: if something is there that must not be replaced.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not overwrite or not out_dir.is_dir():
        raise UsageError(f"{out_dir}: is there already; name a new directory, or say --overwrite.")
    _refuse_foreign(out_dir)


def _refuse_foreign(directory: Path) -> None:
    """Never delete what an export did not write, such as a model card."""
    foreign = [path.name for path in sorted(directory.iterdir()) if not _is_ours(path)]
    if foreign:
        raise UsageError(
            f"{directory}: holds what is of no export ({', '.join(foreign[:5])}); move it away."
        )


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.name == CARD_FILE:
        return path.stat().st_size == 0 or is_card(path)
    return path.name in _OURS or path.match("model*.safetensors")


def eod_of(tokenizer_file: Path, model: Model) -> int:
    """Return the id that ends a document.

    Raises:
        DataError: if the tokenizer cannot be used, or has more ids than the model.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{tokenizer_file}: has {tokenizer.vocab_size} ids, and the model only "
            f"{model.vocab_size}: this is not the tokenizer it was trained with."
        )
    return tokenizer.eod_id


def _generation_config(eod_id: int | None) -> dict[str, Any]:
    # Padding with the end of document is what generate() itself would do, after a warning.
    return {"eos_token_id": eod_id, "pad_token_id": eod_id, "use_cache": True}


def _notes(
    weights: Weights, model: Model, architecture: Architecture, eod_id: int | None
) -> Iterator[str]:
    lost = {"mpt": ("attn_pdrop",), "llama": ("emb_pdrop", "resid_pdrop")}[architecture]
    for key in (key for key in lost if getattr(model, key)):
        yield (
            f"{key} {getattr(model, key)} is not in the export, for transformers has no place for "
            "it. It acts in training, not on what the exported model computes."
        )
    if model.attn_uses_sequence_id:
        yield (
            "attn_uses_sequence_id is not in the export: each text is a document by itself there, "
            "and is computed as it was trained."
        )
    if len(found := {str(weights.dtype(name)) for name in weights.shapes}) > 1:
        yield f"tensors are of several types, {', '.join(sorted(found))}, and each keeps its own."
    if eod_id is None:
        yield "no tokenizer was given, so the export has none and knows no end of document."


@contextmanager
def _whole_or_absent(out_dir: Path) -> Iterator[Path]:
    """Give a directory to write into, which gets its name when all went well."""
    partial = out_dir.with_name(out_dir.name + ".partial")
    _clear(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _commit(partial, out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _clear(directory: Path) -> None:
    """Remove what an export that was killed left behind."""
    if directory.is_dir():
        _refuse_foreign(directory)
        shutil.rmtree(directory)


def _commit(partial: Path, out_dir: Path) -> None:
    """Give the finished directory its name, in place of what had it before."""
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_dir(partial)
    replaced = out_dir.with_name(out_dir.name + ".replaced")
    _clear(replaced)
    if out_dir.exists():
        out_dir.rename(replaced)
    partial.rename(out_dir)
    fsync_dir(out_dir.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
