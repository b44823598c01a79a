"""A checkpoint's weights as one GGUF file for llama.cpp, read back before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpt.checkpoint.weights import Weights
from mpt.errors import CheckpointError, UsageError
from mpt.hf.card import CARD_FILE, is_card
from mpt.hf.export import TORCH_DTYPES, Dtype, Exported, eod_of
from mpt.hf.gguf_names import gguf_name, unsupported_by_gguf
from mpt.hf.gguf_proof import GgufProof, prove
from mpt.hf.gguf_tokens import Vocabulary, vocabulary
from mpt.hf.load import check_shapes
from mpt.recipe.model import Model
from mpt.storage import atomic_write, fsync_dir
from mpt.tokenizer import Tokenizer, load_tokenizer

SUFFIX = ".gguf"

_FILE_TYPES: dict[Dtype, str] = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "fp16": "MOSTLY_F16"}
_TENSOR_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def export_gguf(
    weights: Weights,
    model: Model,
    tokenizer_file: Path | None,
    out: Path,
    *,
    dtype: Dtype,
    overwrite: bool,
    card: Callable[[str], str] | None = None,
) -> Exported:
    """Write a GGUF file that llama.cpp runs: whole and proved, or not at all.

    One tensor is in memory at a time, and for the proof as many blocks as it compares.

    Args:
        tokenizer_file: without one, the file holds weights only.
        out: the file, if it ends in .gguf; else the directory to put it in, with the card.
        dtype: of matrices; gains, biases and learned positions are always fp32, as llama.cpp
            wants them.
        overwrite: replace an earlier export in `out`.
        card: gives the text of README.md from what was proved; not written beside a file.

    Raises:
        UsageError: if `out` is taken, the `gguf` package is missing, or llama.cpp would not
            compute this model; names every option in the way.
        CheckpointError: if the weights are not those of `model`, or not finite as `dtype`.
        DataError: if the tokenizer cannot be used, or has more ids than the model.
        ExportError: if the file does not hold what it should. It is not left behind.
    """
    library = _library()
    _refuse_unsupported(model)
    out = out.resolve()
    file = out if out.suffix == SUFFIX else out / f"{out.name}{SUFFIX}"
    _refuse_taken(out, file, overwrite)
    check_shapes(weights.shapes, model, weights.directory)
    words = None if tokenizer_file is None else _vocabulary(tokenizer_file, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    try:
        tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
        proof = _write_proved(library, partial, weights, model, words, dtype, tokenizer)
        if card is not None and file != out:
            atomic_write(out / CARD_FILE, card(str(proof)))
        partial.rename(file)
        fsync_dir(file.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    files = [file] + [path for path in (out / CARD_FILE,) if file != out and path.is_file()]
    return Exported(
        directory=file.parent,
        files=tuple(path.name for path in files),
        bytes=sum(path.stat().st_size for path in files),
        dtype=dtype,
        proof=proof,
        notes=tuple(_notes(model, words)),
    )


@dataclass(frozen=True)
class _Plan:
    """Our tensors as they are to be stored."""

    weights: Weights
    matrix_dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        """Of our own, in the order in which they lie in the file."""
        return sorted(self.weights.shapes)

    def dtype(self, name: str) -> torch.dtype:
        """Learned positions are added to what is fp32, so llama.cpp has them so."""
        is_matrix = len(self.weights.shapes[name]) > 1 and "wpe" not in name
        return self.matrix_dtype if is_matrix else torch.float32

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: if it is not finite.
        """
        tensor = self.weights.read(name).to(self.dtype(name)).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.weights.directory}: {name} is not finite as {tensor.dtype}; export as "
                "fp32, or from a checkpoint before the run diverged."
            )
        return tensor


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "the `gguf` package writes such files: pip install 'mpt-train[gguf]'."
        ) from error
    return gguf


def _refuse_unsupported(model: Model) -> None:
    if reasons := unsupported_by_gguf(model):
        raise UsageError(
            "llama.cpp's MPT cannot run this model, so it is not exported:\n  "
            + "\n  ".join(reasons)
        )


def _vocabulary(tokenizer_file: Path, model: Model) -> Vocabulary:
    eod_of(tokenizer_file, model)  # refuses one that does not fit
    return vocabulary(tokenizer_file, model.vocab_size)


def _refuse_taken(out: Path, file: Path, overwrite: bool) -> None:
    if file == out:
        foreign = out.is_dir() or (out.exists() and not _is_gguf(out))
        taken = out.exists()
    else:
        there = sorted(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
        ours = {file.name: _is_gguf, CARD_FILE: is_card, f"{file.name}.partial": Path.is_file}
        foreign = any(path.name not in ours or not ours[path.name](path) for path in there)
        taken = bool(there)
    if taken and (foreign or not overwrite):
        what = "holds what is of no such export" if foreign else "is there already"
        raise UsageError(f"{out}: {what}; name a new file or directory, or say --overwrite.")


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _write_proved(
    library: Any,
    path: Path,
    weights: Weights,
    model: Model,
    words: Vocabulary | None,
    dtype: Dtype,
    tokenizer: Tokenizer | None,
) -> GgufProof:
    plan = _Plan(weights, TORCH_DTYPES[dtype])
    said = _write(library, path, plan, model, words, dtype)
    names = {gguf_name(name): name for name in plan.names}
    return prove(library, path, said, names, plan.read, model, tokenizer)


def _write(
    library: Any, path: Path, plan: _Plan, model: Model, words: Vocabulary | None, dtype: Dtype
) -> dict[str, Any]:
    """Write the file, and return the metadata that it should hold."""
    writer = library.GGUFWriter(path, library.MODEL_ARCH_NAMES[library.MODEL_ARCH.MPT])
    try:
        _add_shape(writer, model)
        writer.add_file_type(library.LlamaFileType[_FILE_TYPES[dtype]])
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
        _add_vocabulary(library, writer, words)
        for name in plan.names:
            shape, stored = plan.weights.shapes[name], plan.dtype(name)
            writer.add_tensor_info(
                gguf_name(name),
                shape,
                np.dtype(np.uint16 if stored.itemsize == 2 else np.float32),
                int(np.prod(shape)) * stored.itemsize,
                raw_dtype=library.GGMLQuantizationType[_TENSOR_TYPES[stored]],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in plan.names:
            tensor = plan.read(name)
            # numpy has no bf16: what has two bytes goes as plain numbers.
            raw = tensor.view(torch.uint16) if tensor.itemsize == 2 else tensor
            writer.write_tensor_data(raw.numpy())
        writer.flush()
        for file in writer.fout:
            os.fsync(file.fileno())
        return {key: entry.value for key, entry in writer.kv_data[0].items()}
    finally:
        writer.close()


def _add_shape(writer: Any, model: Model) -> None:
    writer.add_type("model")
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.ffn_width)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    writer.add_layer_norm_eps(model.norm_eps)
    writer.add_vocab_size(model.vocab_size)
    if model.clip_qkv is not None:
        writer.add_clamp_kqv(model.clip_qkv)
    writer.add_max_alibi_bias(float(model.alibi_bias_max) if model.alibi else 0.0)


def _add_vocabulary(library: Any, writer: Any, words: Vocabulary | None) -> None:
    if words is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types([library.TokenType[kind.upper()] for kind in words.types])
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    writer.add_eos_token_id(words.eod_id)
    # Nothing begins a text; left out, llama.cpp would take some other token for it.
    writer.add_bos_token_id(words.eod_id)
    if words.unknown_id is not None:
        writer.add_unk_token_id(words.unknown_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)


def _notes(model: Model, words: Vocabulary | None) -> Iterator[str]:
    if model.act_fn == "gelu":
        yield (
            "llama.cpp computes gelu by its tanh form; the model was trained with the exact one."
        )
    if model.attn_uses_sequence_id:
        yield "attn_uses_sequence_id acts on several documents in one sample; here, there is one."
    if words is None:
        yield "no tokenizer was given, so the file has none: llama.cpp takes token ids only."
    else:
        yield from words.notes
