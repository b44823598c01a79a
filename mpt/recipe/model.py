"""The `model:` section: the shape of the network, in MPT's own spelling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mpt.recipe.problem import Problem

FIXED: dict[str, Any] = {
    "act_fn": "gelu",
    "alibi": True,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "block_overrides": None,
    "embedding_fraction": 1.0,
    "ffn_hidden_size": None,
    "ffn_type": "mptmlp",
    "final_logit_softcapping": None,
    "head_dim": None,
    "init": "kaiming_normal_",
    "kv_n_heads": None,
    "learned_pos_emb": False,
    "logit_scale": None,
    "no_bias": True,
    "norm_eps": 1e-5,
    "norm_type": "low_precision_layernorm",
    "qk_gn": False,
    "qk_ln": False,
    "rope": False,
    "sliding_window_size": -1,
    "tie_word_embeddings": True,
}
"""MPT's other options, each with the one value that is built today: the profile of the released
MPT-7B. A recipe may state that value; any other is refused by name."""

_MOE = "is an option of mixtures of experts, which are not part of this trainer."
_FLAT = "is not a section here; its keys go directly under `model:`."
_BY_ITSELF = "is not a choice here, it follows from the machine; drop it."

REFUSED: dict[str, str] = {
    "attn_config": _FLAT,
    "attn_impl": _BY_ITSELF,
    "fc_type": _BY_ITSELF,
    "ffn_config": _FLAT,
    "init_config": _FLAT,
    "init_device": _BY_ITSELF,
    "moe_loss_weight": _MOE,
    "moe_num_experts": _MOE,
    "moe_top_k": _MOE,
    "moe_world_size": _MOE,
    "prefix_lm": "is not part of this trainer; attention is causal.",
    "use_cache": "is a matter of generation, not of a recipe; drop it.",
}
"""Keys that MPT recipes elsewhere have and this one never will, with what to do instead."""


@dataclass(frozen=True, kw_only=True)
class Model:
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Attention heads; must divide d_model."""
    n_layers: int
    """Decoder blocks."""
    max_seq_len: int
    """Tokens per sample, and the longest input the exported model promises to take."""
    vocab_size: int
    """Rows of the embedding; a multiple of 128 at or above the tokenizer's size is fastest."""
    expansion_ratio: int = 4
    """Feed-forward width, in units of d_model."""
    alibi_bias_max: int = 8
    """The gentlest ALiBi slope is 2**-alibi_bias_max."""
    clip_qkv: float | None = None
    """Clamp queries, keys and values to [-clip_qkv, clip_qkv] right after their projection."""
    softmax_scale: float | None = None
    """Attention scores are multiplied by this; null means 1/sqrt(head_dim)."""
    emb_pdrop: float = 0.0
    """Dropout after the token embedding."""
    resid_pdrop: float = 0.0
    """Dropout on what each attention and feed-forward adds to the residual stream."""
    attn_pdrop: float = 0.0
    """Dropout on attention weights."""

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_parameters(self) -> int:
        """Trained parameters: tied embedding, no biases, one gain per norm."""
        block = (4 + 2 * self.expansion_ratio) * self.d_model**2 + 2 * self.d_model
        return self.vocab_size * self.d_model + self.n_layers * block + self.d_model

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        yield from self._bad_counts()
        if self.n_heads >= 1 and self.d_model % self.n_heads:
            below = max(self.n_heads, self.d_model // self.n_heads * self.n_heads)
            yield Problem(
                "model.n_heads",
                f"{self.n_heads} heads do not divide d_model {self.d_model}.",
                f"use d_model {below} or {below + self.n_heads}, or another head count.",
            )
        for key in ("emb_pdrop", "resid_pdrop", "attn_pdrop"):
            if not 0.0 <= getattr(self, key) < 1.0:
                yield Problem(
                    f"model.{key}", f"{getattr(self, key)} is not a probability in [0, 1)."
                )
        for key in ("clip_qkv", "softmax_scale"):
            value = getattr(self, key)
            if value is not None and not 0.0 < value < float("inf"):
                yield Problem(f"model.{key}", f"{value} is not a positive number; null is off.")

    def _bad_counts(self) -> Iterator[Problem]:
        smallest = {"max_seq_len": 2, "vocab_size": 2}
        counts = (
            "d_model",
            "n_heads",
            "n_layers",
            "max_seq_len",
            "vocab_size",
            "expansion_ratio",
            "alibi_bias_max",
        )
        for key in counts:
            if getattr(self, key) < smallest.get(key, 1):
                yield Problem(
                    f"model.{key}",
                    f"{getattr(self, key)} is too small; the least is {smallest.get(key, 1)}.",
                )
