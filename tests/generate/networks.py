"""Small networks whose weights are random and large, so that what they say depends on all of it."""

from __future__ import annotations

from typing import Any

import torch

from mpt.model.network import MPT
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from mpt.recipe.rope import RopeScaling

CONTEXT = 24
SMALL: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": CONTEXT,
    "vocab_size": 80,
}
ROPE: dict[str, Any] = {"alibi": False, "rope": True}

OPTIONS: dict[str, dict[str, Any]] = {
    "alibi": {},
    "odd number of heads": {"n_heads": 3, "head_dim": 10},
    "grouped queries": {"kv_n_heads": 2},
    "one head of keys": {"attn_type": "multiquery_attention"},
    "window": {"sliding_window_size": 5},
    "documents apart": {"attn_uses_sequence_id": True},
    "no positions": {"alibi": False},
    "learned positions": {"alibi": False, "learned_pos_emb": True},
    "rope": ROPE,
    "rope, linear": ROPE | {"rope_hf_config": RopeScaling(type="linear", factor=2.0)},
    "rope, dynamic": ROPE | {"rope_hf_config": RopeScaling(type="dynamic", factor=2.0)},
    "soft cap": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 9.0},
    "norm of all heads": {"qk_ln": True, "kv_n_heads": 2},
    "norm of each head": {"qk_gn": True} | ROPE,
    "gated": {"ffn_type": "mptglu", "norm_type": "rmsnorm", "no_bias": False},
    "shared keys and windows": {
        "n_layers": 4,
        "block_overrides": BlockOverrides(
            order=(
                Order(name="default"),
                Order(name="near"),
                Order(name="shared"),
                Order(name="shared"),
            ),
            overrides={
                "near": Override(sliding_window_size=4),
                "shared": Override(reuse_kv_layer_idx=-1),
            },
        ),
    },
}


def small(**changes: Any) -> MPT:
    """Return a network in evaluation mode. Its head is its own: a tied one repeats itself."""
    network = MPT(Model(**(SMALL | {"tie_word_embeddings": False} | changes))).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        size = 0.25 if parameter.ndim > 1 else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return network
