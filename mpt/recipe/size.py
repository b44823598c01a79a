"""How large a model is: its parameters, and what each of its blocks has of them."""

from __future__ import annotations

from collections import Counter

from mpt.recipe.layers import Layer
from mpt.recipe.model import Model


def n_parameters(model: Model) -> int:
    """Return the trained parameters."""
    blocks = sum(n * block_parameters(model, layer) for layer, n in kinds(model).items())
    return root_parameters(model) + blocks


def kinds(model: Model) -> dict[Layer, int]:
    """Return how many blocks there are of each kind; their number may be any, so not one by one."""
    alike = model.block_overrides is None
    return {Layer(model.window): model.n_layers} if alike else Counter(model.layers)


def root_parameters(model: Model) -> int:
    """Return those outside of blocks: embeddings, an untied head, the last norm."""
    rows = model.vocab_size * (1 if model.tie_word_embeddings else 2)
    rows += model.max_seq_len if model.learned_pos_emb else 0
    return rows * model.d_model + _norm(model, model.d_model)


def block_parameters(model: Model, layer: Layer) -> int:
    """Return those of one block."""
    width, between = model.d_model, model.ffn_width
    bias = 0 if model.no_bias else 1
    biases = sum(qkv_widths(model, layer)) * (1 if model.attention_bias else bias)
    biases += (_n_up(model) * between + 2 * width) * bias
    norms = 2 * _norm(model, width)
    if model.qk_ln or model.qk_gn:
        widths = [model.q_width, model.kv_width] if layer.kv_from is None else [model.q_width]
        norms += sum(_norm(model, model.head_width if model.qk_gn else w) for w in widths)
    return matrix_parameters(model, layer) + biases + norms


def matrix_parameters(model: Model, layer: Layer) -> int:
    """Return those of one block that are entries of its matrices."""
    attention = sum(qkv_widths(model, layer)) + model.q_width
    feed_forward = (_n_up(model) + 1) * model.ffn_width
    return model.d_model * (attention + feed_forward)


def _n_up(model: Model) -> int:
    return 2 if model.ffn_type == "mptglu" else 1


def qkv_widths(model: Model, layer: Layer) -> tuple[int, ...]:
    """Return the widths of queries, keys and values; a block that borrows has queries alone."""
    borrows = layer.kv_from is not None
    return (model.q_width,) if borrows else (model.q_width, model.kv_width, model.kv_width)


def _norm(model: Model, width: int) -> int:
    return width * (2 if model.norm_type.endswith("layernorm") and not model.no_bias else 1)


def reach(model: Model, layer: Layer) -> int:
    """Return how many tokens a token sees at most, itself included."""
    tokens = model.max_seq_len
    return tokens if layer.window is None else min(tokens, layer.window + 1)
