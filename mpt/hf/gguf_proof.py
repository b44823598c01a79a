"""Proof of a GGUF file: what is read back is what was meant, and computes what our network does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpt.errors import ExportError
from mpt.hf.gguf_read import ids_of
from mpt.hf.load import build_network
from mpt.hf.prove import HARD_TEXTS
from mpt.recipe.budget import n_parameters
from mpt.recipe.model import Model
from mpt.tokenizer import SPACE_MARK, Tokenizer

TOLERANCE = 1e-4
"""Largest difference of a logit, in fp32 on both sides, up to logits of 100."""

_PROOF_BYTES = 2 << 30  # of fp32 weights; a larger model is compared as far up as that
_SAMPLES, _LENGTH = 2, 256
_PROMPT, _GREEDY = 8, 16


@dataclass(frozen=True)
class GgufProof:
    """What was compared, and how far apart it was."""

    n_tensors: int
    """Read back, equal bit for bit."""
    n_blocks: int
    """Of the model whose logits were compared: a large one's first blocks, then norm and head."""
    n_tokens: int
    """Positions whose logits were compared."""
    n_greedy: int
    """Tokens that the file's forward pass continues with, each of them our likeliest."""
    n_texts: int
    """Texts whose ids, read by the file's own vocabulary, are the tokenizer's; 0 without one."""
    max_difference: float
    """Largest absolute difference of a logit."""
    tanh_gelu_difference: float
    """The same, where llama.cpp's form of gelu is in the place of the model's."""

    def __str__(self) -> str:
        return (
            f"The file was read back: {self.n_tensors} tensors, equal bit for bit. A plain forward "
            f"pass over them by llama.cpp's definition of MPT gives our logits of {self.n_blocks} "
            f"blocks at {self.n_tokens} positions to {self.max_difference:.1e}, and to "
            f"{self.tanh_gelu_difference:.1e} with the tanh form of gelu that llama.cpp uses; "
            f"{self.n_greedy} greedy tokens are the same, and so are the ids of {self.n_texts} "
            "texts read by the file's own vocabulary."
        )


def prove(
    library: Any,
    path: Path,
    said: Mapping[str, Any],
    names: Mapping[str, str],
    meant: Callable[[str], Tensor],
    model: Model,
    tokenizer: Tokenizer | None,
) -> GgufProof:
    """Read a file back, compare its tensors and, computed from them and its metadata, its logits.

    Also what it continues with, and the ids that its vocabulary gives to texts.

    Args:
        said: the metadata, by key.
        names: ours, by the file's.
        meant: returns one of our tensors, by our name, as it should be stored.

    Raises:
        ExportError: if there is a difference that rounding does not make.
    """
    values, stored = _read_back(library.GGUFReader(path), path, said, names, meant)
    small = _first_blocks(model)
    generator = torch.Generator().manual_seed(0)
    length = min(model.max_seq_len, _LENGTH)
    tokens = torch.randint(model.vocab_size, (_SAMPLES, length), generator=generator)
    with torch.inference_mode():
        network = build_network(small, lambda name: meant(name).float())
        ours: Tensor = network(tokens)

        def read(name: str) -> Tensor | None:
            return _tensor(path, stored[name]).float() if name in stored else None

        file = _File(values, read)
        same_gelu = "tanh" if model.act_fn == "gelu_tanh" else "none"
        difference = _largest(file.logits(tokens, small.n_layers, same_gelu) - ours)
        with_tanh = _largest(file.logits(tokens, small.n_layers, "tanh") - ours)
        greedy = _continue(tokens[:1], lambda text: file.logits(text, small.n_layers, same_gelu))
        answer: Tensor = network(greedy)[0, :-1]
    limit = TOLERANCE * max(1.0, _largest(ours) / 100)
    if not difference < limit:  # also when it is NaN
        raise ExportError(
            f"{path}: is wrong: logits computed from it differ from ours by {difference:.3g}."
        )
    begun = _begin(tokens)
    chosen = answer[begun - 1 :].gather(1, greedy[0, begun:, None]).squeeze(1)
    if not bool((chosen >= answer[begun - 1 :].max(dim=1).values - limit).all()):
        raise ExportError(f"{path}: is wrong: what it continues with is not our likeliest token.")
    return GgufProof(
        len(stored),
        small.n_layers,
        tokens.numel(),
        len(chosen),
        0 if tokenizer is None else _compare_ids(path, values, tokenizer),
        difference,
        with_tanh,
    )


def _read_back(
    reader: Any,
    path: Path,
    said: Mapping[str, Any],
    names: Mapping[str, str],
    meant: Callable[[str], Tensor],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and the tensors of a file, having found them as they should be."""
    values = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    values = {key: value for key, value in values.items() if not key.startswith("GGUF.")}
    if wrong := sorted(key for key in values.keys() | said if not _same(key, values, said)):
        raise ExportError(f"{path}: its metadata was not written as it should be: {wrong}.")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if stored.keys() != names.keys():
        raise ExportError(f"{path}: holds other tensors: {sorted(stored.keys() ^ names.keys())}.")
    for there, here in names.items():
        tensor, wanted = _tensor(path, stored[there]), meant(here)
        if tensor.dtype != wanted.dtype or not torch.equal(_bits(tensor), _bits(wanted)):
            raise ExportError(f"{path}: {there} was not written as it should be.")
    return values, stored


def _begin(tokens: Tensor) -> int:
    """How many tokens a greedy text begins with."""
    return max(1, min(_PROMPT, tokens.shape[1] // 2))


def _continue(tokens: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a beginning of (1, S) tokens with what `logits` find likeliest: at most (1, S)."""
    begun = _begin(tokens)
    text = tokens[:, :begun]
    for _ in range(min(_GREEDY, tokens.shape[1] - begun)):
        text = torch.cat([text, logits(text)[:, -1:].argmax(dim=-1)], dim=1)
    return text


def _compare_ids(path: Path, values: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    """Return how many texts have the tokenizer's ids by the file's vocabulary."""
    by_pieces = values["tokenizer.ggml.model"] == "llama"
    # llama.cpp reads that mark as a space, which a note of the export says.
    texts = [text for text in HARD_TEXTS if not (by_pieces and SPACE_MARK in text)]
    for text in texts:
        if ids_of(values, text) != tokenizer.encode(text):
            raise ExportError(f"{path}: is wrong: its vocabulary gives other ids for {text!r}.")
    return len(texts)


@dataclass(frozen=True)
class _File:
    """The tensors and metadata of a file, and what llama.cpp computes of them.

    Source:
        llama.cpp, src/models/mpt.cpp (the graph) and ggml's soft_max (ALiBi's slopes).
    """

    values: Mapping[str, Any]
    tensor: Callable[[str], Tensor | None]

    def logits(self, tokens: Tensor, n_blocks: int, gelu: str) -> Tensor:  # (B, S) -> (B, S, V)
        """Return the logits after so many blocks; all of the model's, that is llama.cpp's."""
        n_heads = self.values["mpt.attention.head_count"]
        n_kv, clamp = self.values["mpt.attention.head_count_kv"], self._clamp()
        embedding = self._needed("token_embd.weight")
        x, width = embedding[tokens], embedding.shape[1] // n_heads
        if (places := self.tensor("position_embd.weight")) is not None:
            x = x + places[: tokens.shape[1]]
        distance = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
        bias = -self.slopes(n_heads)[:, None, None] * distance
        bias = bias.masked_fill(distance < 0, -math.inf)  # (H, S, S)
        for block in range(n_blocks):
            at = f"blk.{block}."
            qkv = self._linear(self._norm(x, at + "attn_norm"), at + "attn_qkv")
            sizes = [n_heads * width, n_kv * width, n_kv * width]
            q, k, v = qkv.clamp(-clamp, clamp).split(sizes, dim=-1)
            q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
            k, v = (t.repeat_interleave(n_heads // n_kv, dim=1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) / math.sqrt(width) + bias
            seen = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
            x = x + self._linear(seen, at + "attn_output")
            between = self._linear(self._norm(x, at + "ffn_norm"), at + "ffn_up")
            x = x + self._linear(F.gelu(between, approximate=gelu), at + "ffn_down")
        x = self._norm(x, "output_norm")
        untied = self.tensor("output.weight")
        return x @ (embedding if untied is None else untied).T

    def slopes(self, n_heads: int) -> Tensor:
        """ggml's slopes, (H,): those of the power of two below, then every other one between."""
        bias_max = self.values.get("mpt.attention.max_alibi_bias", 0.0)
        if bias_max <= 0.0:
            return torch.zeros(n_heads)
        below = 2 ** math.floor(math.log2(n_heads))
        steep, between = 2.0 ** (-bias_max / below), 2.0 ** (-bias_max / 2 / below)
        slopes = [
            steep ** (h + 1) if h < below else between ** (2 * (h - below) + 1)
            for h in range(n_heads)
        ]
        return torch.tensor(slopes, dtype=torch.float32)

    def _clamp(self) -> float:
        limit: float = self.values.get("mpt.attention.clamp_kqv", 0.0)
        return limit if limit > 0.0 else math.inf

    def _needed(self, name: str) -> Tensor:
        tensor = self.tensor(name)
        if tensor is None:
            raise ExportError(f"{name} is missing.")
        return tensor

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._needed(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.values["mpt.attention.layer_norm_epsilon"]
        weight, bias = self._needed(f"{name}.weight"), self.tensor(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, eps)


def _first_blocks(model: Model) -> Model:
    """Return the model cut to as many blocks as the proof may hold, 2 at least if there are."""
    outside = n_parameters(replace(model, n_layers=1, block_overrides=None))
    block = n_parameters(replace(model, n_layers=2, block_overrides=None)) - outside
    room = _PROOF_BYTES // 4 - outside
    n_blocks = min(model.n_layers, max(2, 1 + room // block))
    return replace(model, n_layers=n_blocks, block_overrides=None)


def _same(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    if key not in there or key not in here:
        return False
    found, wanted = np.asarray(there[key]), np.asarray(here[key])
    if found.dtype.kind == "f":  # the file has fp32
        found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    return found.shape == wanted.shape and bool((found == wanted).all())


def _tensor(path: Path, stored: Any) -> Tensor:
    """Return a tensor as it lies in the file: read, not mapped, or all of it would stay around."""
    shape = tuple(int(size) for size in reversed(stored.shape))  # ggml's fastest one comes first
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    content = np.fromfile(path, np.uint8, int(stored.n_bytes), offset=int(stored.data_offset))
    return torch.from_numpy(content).view(dtype[stored.tensor_type.name]).view(shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
