"""A checkpoint's weights as a Hugging Face model directory that has proved itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mpt.checkpoint.weights import Weights
from mpt.errors import DataError, UsageError
from mpt.hf.config import config_json
from mpt.hf.load import check_shapes
from mpt.hf.prove import Proof, prove
from mpt.hf.shards import INDEX, write_shards
from mpt.hf.tokenizer import MODEL_FILE, write_tokenizer
from mpt.recipe.model import Model
from mpt.storage import fsync_dir
from mpt.tokenizer import load_tokenizer

Dtype = Literal["fp32", "bf16", "fp16"]

_TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

SHARD_BYTES = 5_000_000_000
"""Bytes a weight file may have: what the hub recommends, and about the memory of an export."""

_OURS = {
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    MODEL_FILE,
}


@dataclass(frozen=True)
class Exported:
    """What was written, and whether transformers agreed with it."""

    directory: Path
    files: tuple[str, ...]
    bytes: int
    dtype: Dtype
    proof: Proof | None
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
    dtype: Dtype = "fp32",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Exported:
    """Write `out_dir` as a model that transformers loads by itself: whole, proved, or not at all.

    Args:
        tokenizer_file: a sentencepiece model; without one, no tokenizer is written.
        dtype: of the stored weights. The default is the checkpoint's own, so that nothing is
            lost unasked; bf16 and fp16 halve the files, and round.
        shard_bytes: most bytes of a weight file; a tensor that is larger has a file to itself.
        overwrite: replace an earlier export in `out_dir`.

    Raises:
        UsageError: if `out_dir` is taken, or transformers would not compute this model.
        CheckpointError: if the weights are not those of `model`, or not finite as `dtype`.
        DataError: if the tokenizer cannot be used, or has more ids than the model.
        ExportError: if transformers does not give our logits and ids. No `out_dir` is left.
    """
    out_dir = out_dir.resolve()
    _refuse_taken(out_dir, overwrite)
    eod_id = None if tokenizer_file is None else _eod_id(tokenizer_file, model)
    torch_dtype = _TORCH_DTYPES[dtype]
    config = config_json(model, dtype=str(torch_dtype).removeprefix("torch."), eod_id=eod_id)
    check_shapes(weights.shapes, model, weights.directory)
    partial = out_dir.with_name(out_dir.name + ".partial")
    _clear(partial)
    partial.mkdir(parents=True)
    try:
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", _generation_config(eod_id))
        if index := write_shards(partial, weights, torch_dtype, shard_bytes):
            _write_json(partial / INDEX, index)
        if tokenizer_file is not None:
            write_tokenizer(tokenizer_file, partial, max_length=model.max_seq_len)
        proof = prove(partial, weights, model, torch_dtype)
        _commit(partial, out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    files = sorted(out_dir.iterdir())
    return Exported(
        directory=out_dir,
        files=tuple(path.name for path in files),
        bytes=sum(path.stat().st_size for path in files),
        dtype=dtype,
        proof=proof,
        notes=tuple(_notes(model, eod_id)),
    )


def _refuse_taken(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if not overwrite or not out_dir.is_dir():
        raise UsageError(f"{out_dir}: is there already; name a new directory, or overwrite it.")
    _refuse_foreign(out_dir)


def _refuse_foreign(directory: Path) -> None:
    """Never delete what an export did not write, such as a model card."""
    foreign = [path.name for path in sorted(directory.iterdir()) if not _is_ours(path)]
    if foreign:
        raise UsageError(
            f"{directory}: holds what is of no export ({', '.join(foreign[:5])}); move it away."
        )


def _is_ours(path: Path) -> bool:
    return path.is_file() and (path.name in _OURS or path.match("model*.safetensors"))


def _eod_id(tokenizer_file: Path, model: Model) -> int:
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


def _notes(model: Model, eod_id: int | None) -> Iterator[str]:
    if model.attn_pdrop:
        yield (
            f"attn_pdrop {model.attn_pdrop} is written as 0: transformers takes whole numbers "
            "only. It acts in training, not on what the exported model computes."
        )
    if eod_id is None:
        yield "no tokenizer was given, so the export has none and knows no end of document."


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
