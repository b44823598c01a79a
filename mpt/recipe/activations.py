"""What one microbatch leaves in memory for its backward pass, by arithmetic alone."""

from __future__ import annotations

from typing import Literal

from mpt.recipe.layers import Layer
from mpt.recipe.model import Model
from mpt.recipe.size import kinds, qkv_widths, reach

Precision = Literal["bf16", "fp32"]
Attention = Literal["sdpa", "blocks", "wide", "flex", "flash"]
Recompute = Literal["none", "selective", "full"]
"""none keeps all; selective keeps what matrix products and fused attention give, and makes norms,
activations and the like again; full keeps a block's input alone and runs the block again."""

BYTES = {"bf16": 2, "fp32": 4}
HEAD_ROWS = 2048
"""Rows of logits that exist at a time: the head is computed in chunks of so many positions."""
QUERY_BLOCK = 128
"""Queries that attention handles at a time where it is not fused."""
_KEEPS_ITS_OUTPUT = ("relu", "tanh")
"""Activations whose gradient follows from what they put out; others keep what they are given."""


def activation_bytes(
    model: Model,
    microbatch_size: int,
    precision: Precision,
    attention: Attention = "blocks",
    recompute: Recompute = "none",
) -> int:
    """Estimate the bytes of tensors kept for the backward pass of one microbatch.

    A block keeps, in values of the compute dtype, for each of B S tokens:
    - 4 D: both norms' inputs and outputs.
    - queries, keys and values, and what attention puts out: 4 D with a head for each, less with
      fewer heads of keys or with those of another block. clip_qkv and q/k norms keep what they
      are given as well.
    - 2 F of the feed-forward of width F, before and after its activation; gated it is 4 F. An
      activation whose gradient follows from its output (relu, tanh) keeps F less.
    - with resid_pdrop a mask of D for each of its two uses.
    - what `_attention_values` says, which depends on the backend.
    With full recomputation a block keeps its input alone (D), with a selective one also what its
    matrix products and a fused attention put out; one block at a time has all of the above.
    Outside the blocks: the last norm's input and output and the gradient at the head (3 B S D);
    the head's gradient in fp32 (V D); and for one chunk of HEAD_ROWS positions, never for all,
    logits and their gradient in fp32 and once in the compute dtype.
    Not counted: the allocator's rounding, libraries, what lives only within one operation, and
    keys and values that are kept for blocks that borrow them, where all else is made again.
    """
    value = BYTES[precision]
    tokens = microbatch_size * model.max_seq_len
    whole, brief = {}, {}
    for layer in kinds(model):
        pairs = _attention_values(model, layer, microbatch_size, precision, attention)
        whole[layer] = tokens * _block_values(model, layer) + pairs
        brief[layer] = tokens * _unrepeated_values(model, layer, attention, recompute)
    if recompute == "none":
        kept = sum(n * whole[layer] for layer, n in kinds(model).items())
    else:
        kept = sum(n * brief[layer] for layer, n in kinds(model).items())
        kept += max(whole[layer] - brief[layer] for layer in whole)
    outside = 3 + (model.emb_pdrop > 0)
    chunk = min(HEAD_ROWS, tokens) * model.vocab_size * (2 * BYTES["fp32"] + value)
    head = chunk + BYTES["fp32"] * model.vocab_size * model.d_model
    return value * (kept + tokens * outside * model.d_model) + head


def _block_values(model: Model, layer: Layer) -> int:
    """Values that a block keeps of each token, but for what attention does between tokens."""
    widths = qkv_widths(model, layer)
    values = (4 + 2 * (model.resid_pdrop > 0)) * model.d_model
    values += sum(widths) + model.q_width
    values += sum(widths) * (model.clip_qkv is not None)
    if model.qk_ln or model.qk_gn:
        values += sum(widths[:2])
    keeps = 1 if model.act_fn in _KEEPS_ITS_OUTPUT else 2
    return values + model.ffn_width * (keeps + 2 * (model.ffn_type == "mptglu"))


def _unrepeated_values(
    model: Model, layer: Layer, attention: Attention, recompute: Recompute
) -> int:
    """Values that a block keeps of each token when it makes the others again."""
    if recompute == "full":
        return model.d_model
    n_up = 2 if model.ffn_type == "mptglu" else 1
    products = sum(qkv_widths(model, layer)) + 2 * model.d_model + n_up * model.ffn_width
    return model.d_model + products + _fused_values(model, layer, attention)


def _fused_values(model: Model, layer: Layer, attention: Attention) -> int:
    """Values that a fused attention puts out for each token; 0 where it is not fused."""
    capped = model.attn_logit_softcapping is not None
    if attention == "blocks" or (capped and attention in ("sdpa", "wide")):
        return 0
    wide = attention == "wide" and _can_be_wide(model, layer)
    return model.n_heads * _wider(model) if wide else model.q_width


def _can_be_wide(model: Model, layer: Layer) -> bool:
    """Whether attention asked to be wide is: what that cannot do is left to sdpa."""
    windowed = reach(model, layer) < model.max_seq_len
    more = windowed or model.attn_uses_sequence_id or model.attn_logit_softcapping is not None
    return model.alibi and not more and model.attn_pdrop == 0


def _wider(model: Model) -> int:
    """Width of a head with four dimensions more, rounded up."""
    return -(-(model.head_width + 4) // 16) * 16


def _attention_values(
    model: Model, layer: Layer, n_samples: int, precision: Precision, attention: Attention
) -> int:
    """Values that attention keeps of pairs of tokens in one block, by backend.

    - blocks: the weights of the causal half, rounded up to query blocks: B H S (S + 128) / 2. A
      window of W tokens leaves B H S (W + 128) at most. attn_pdrop and softcapping keep more of
      each pair, and partly in fp32.
    - sdpa: with softcapping as much, of all B H S S pairs. Otherwise the bias, if there is one:
      H S S with ALiBi, S S with a window alone, B times that where documents do not see each
      other. (attn_pdrop costs nothing on a GPU; on the CPU torch keeps weights besides.)
    - wide: nothing of pairs; but wider queries, keys, values and outputs in place of the narrow
      ones. What it cannot do is left to sdpa.
    - flex, flash: nothing.
    """
    tokens, capped = model.max_seq_len, model.attn_logit_softcapping is not None
    windowed = reach(model, layer) < tokens
    heads = n_samples * model.n_heads
    fp32 = BYTES["fp32"] // BYTES[precision]
    of_a_pair = fp32 * (1 + capped) + (2 if model.attn_pdrop > 0 else fp32 - 1)
    if attention == "wide" and not _can_be_wide(model, layer):
        attention = "sdpa"
    match attention:
        case "blocks":
            keys = min(tokens, (tokens + QUERY_BLOCK) // 2)
            if layer.window is not None:
                keys = min(keys, layer.window + QUERY_BLOCK)
            plain = model.attn_pdrop == 0 and not capped
            return heads * tokens * keys * (1 if plain else of_a_pair)
        case "sdpa" if capped:
            return heads * tokens**2 * of_a_pair
        case "sdpa" if model.alibi or windowed or model.attn_uses_sequence_id:
            n_biases = n_samples if model.attn_uses_sequence_id else 1
            return n_biases * (model.n_heads if model.alibi else 1) * tokens**2
        case "wide":
            widths = 2 * (model.n_heads + model.n_kv_heads) * _wider(model)
            return n_samples * tokens * (widths - sum(qkv_widths(model, layer)))
        case _:
            return 0
