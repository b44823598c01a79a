"""What llama.cpp's MPT can compute, and what it calls our tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mpt.recipe.layers import Layer
from mpt.recipe.model import Model

_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.norm_f": "output_norm",
    "lm_head": "output",
}
_BLOCK_NAMES = {
    "norm_1": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "norm_2": "ffn_norm",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
_BLOCKS = "transformer.blocks."


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of one of our tensors: `blk.0.attn_qkv.weight`."""
    owner, _, kind = name.rpartition(".")
    if not owner.startswith(_BLOCKS):
        return f"{_NAMES[owner]}.{kind}"
    number, _, part = owner.removeprefix(_BLOCKS).partition(".")
    return f"blk.{number}.{_BLOCK_NAMES[part]}.{kind}"


def unsupported_by_gguf(model: Model) -> list[str]:
    """Return what llama.cpp's MPT cannot compute, a sentence per option; none is good."""
    return list(_in_the_way(model))


def _in_the_way(model: Model) -> Iterator[str]:
    """As of llama.cpp's src/models/mpt.cpp in llama-cpp-python 0.3.36, which was tried.

    With q/k norms, that one reshapes a part of Wqkv's output that is not contiguous, and ggml
    aborts the process. Its activation is the tanh form of gelu, whatever the model was trained
    with; the difference is small, measured, and told.
    """
    if model.rope:
        yield "model.rope: llama.cpp's MPT rotates nothing"
    if not model.norm_type.endswith("layernorm"):
        yield f"model.norm_type: {model.norm_type!r}; llama.cpp's MPT has LayerNorm only"
    if model.ffn_type != "mptmlp":
        yield f"model.ffn_type: {model.ffn_type!r}; llama.cpp's MPT has 'mptmlp' only"
    if model.act_fn not in ("gelu", "gelu_tanh"):
        yield f"model.act_fn: {model.act_fn!r}; llama.cpp's MPT has gelu only"
    if model.q_width != model.d_model:
        yield f"model.head_dim: {model.head_dim}; llama.cpp's MPT has d_model / n_heads only"
    if model.scale != 1 / math.sqrt(model.head_width):
        yield f"model.softmax_scale: {model.scale}; llama.cpp's MPT has 1/sqrt(head_dim) only"
    if model.qk_ln:
        yield "model.qk_ln: llama.cpp's MPT has it, and aborts on it"
    if model.qk_gn:
        yield "model.qk_gn: is not in llama.cpp's MPT"
    if model.attn_logit_softcapping is not None:
        yield "model.attn_logit_softcapping: is not in llama.cpp's MPT"
    if model.final_logit_softcapping is not None:
        yield "model.final_logit_softcapping: is not in llama.cpp's MPT"
    if model.logit_factor != 1.0:
        yield f"model.logit_scale: {model.logit_scale!r}; llama.cpp's MPT scales no logits"
    if model.window is not None:
        yield "model.sliding_window_size: llama.cpp's MPT sees everything"
    if model.block_overrides is not None and set(model.layers) != {Layer()}:
        yield "model.block_overrides: all blocks of llama.cpp's MPT are alike"
