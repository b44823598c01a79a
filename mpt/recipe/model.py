"""The `model:` section: the shape of the network, in MPT's own spelling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mpt.recipe.init import Init
from mpt.recipe.layers import BlockOverrides, Layer
from mpt.recipe.problem import Problem
from mpt.recipe.rope import RopeScaling

AttnType = Literal["multihead_attention", "grouped_query_attention", "multiquery_attention"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "mish", "elu", "tanh"]
NormType = Literal["layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"]

_PROBABILITIES = ("emb_pdrop", "resid_pdrop", "attn_pdrop")
_POSITIVE = (
    "expansion_ratio",
    "clip_qkv",
    "softmax_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope_theta",
    "norm_eps",
)
_COUNTS = (
    "d_model",
    "n_heads",
    "n_layers",
    "max_seq_len",
    "vocab_size",
    "alibi_bias_max",
    "head_dim",
    "kv_n_heads",
    "ffn_hidden_size",
)


_GENTLEST = 64
"""At 2**-64, a slope does not tell any two tokens of any text apart."""


@dataclass(frozen=True, kw_only=True)
class Model:
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Attention heads; must divide d_model unless head_dim is given."""
    n_layers: int
    """Decoder blocks."""
    max_seq_len: int
    """Tokens per sample, and the longest input the exported model promises to take."""
    vocab_size: int
    """Rows of the embedding; a multiple of 128 at or above the tokenizer's size is fastest."""

    attn_type: AttnType | None = None
    """Follows from kv_n_heads; may be stated. multiquery_attention is kv_n_heads 1."""
    kv_n_heads: int | None = None
    """Heads of keys and values, each shared by n_heads / kv_n_heads queries; null: n_heads."""
    head_dim: int | None = None
    """Width of a head; null means d_model / n_heads."""
    clip_qkv: float | None = None
    """Clamp queries, keys and values to [-clip_qkv, clip_qkv] right after their projection."""
    qk_ln: bool = False
    """Normalise queries and keys over the full width of all heads."""
    qk_gn: bool = False
    """Normalise queries and keys within each head."""
    softmax_scale: float | None = None
    """Attention scores are multiplied by this; null means 1/sqrt(head_dim)."""
    attn_logit_softcapping: float | None = None
    """Scaled scores s become c * tanh(s / c), before any bias."""
    sliding_window_size: int = -1
    """A token sees so many tokens before itself, and itself; -1: all of them."""
    attn_uses_sequence_id: bool = False
    """Documents packed into one sample do not see each other."""
    attention_bias: bool = False
    """A bias on Wqkv although no_bias is set."""
    attn_pdrop: float = 0.0
    """Dropout on attention weights."""

    alibi: bool = True
    """Attention decays linearly with distance, with a slope for each head."""
    alibi_bias_max: int = 8
    """The gentlest ALiBi slope is 2**-alibi_bias_max."""
    rope: bool = False
    """Queries and keys are rotated by their position."""
    rope_theta: float = 10_000.0
    """RoPE's base: the slowest rotation takes about 2 pi rope_theta tokens for a turn."""
    rope_hf_config: RopeScaling = field(default_factory=RopeScaling)
    """How rotations are stretched for contexts longer than those first trained on."""
    learned_pos_emb: bool = False
    """A trained vector for each position is added to the token embedding."""

    ffn_type: Literal["mptmlp", "mptglu"] = "mptmlp"
    """mptmlp: down(act(up(x))); mptglu: down(act(gate(x)) * up(x))."""
    expansion_ratio: float = 4.0
    """Feed-forward width, in units of d_model."""
    ffn_hidden_size: int | None = None
    """Feed-forward width itself; wins over expansion_ratio."""
    act_fn: Activation = "gelu"
    """Activation of the feed-forward; gelu is the exact one."""

    norm_type: NormType = "low_precision_layernorm"
    """The low-precision ones are the same here: all compute in fp32 and round once."""
    norm_eps: float = 1e-5
    """Added to the variance, or to the mean square."""
    no_bias: bool = True
    """No biases, in norms neither; attention_bias may bring back that of Wqkv."""
    tie_word_embeddings: bool = True
    """The head's weight is the token embedding."""
    logit_scale: float | Literal["inv_sqrt_d_model"] | None = None
    """Logits are multiplied by this."""
    final_logit_softcapping: float | None = None
    """Logits z become c * tanh(z / c), after logit_scale."""
    emb_pdrop: float = 0.0
    """Dropout after the embedding."""
    resid_pdrop: float = 0.0
    """Dropout on what each attention and feed-forward adds to the residual stream."""
    embedding_fraction: float = 1.0
    """Only this fraction of the gradient reaches the embedding (GLM's stabiliser)."""
    block_overrides: BlockOverrides | None = None
    """Blocks that differ: their sliding window, or that they share another's keys and values."""
    init_config: Init = field(default_factory=Init)
    """How weights begin."""

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values."""
        if self.kv_n_heads is not None:
            return self.kv_n_heads
        return 1 if self.attn_type == "multiquery_attention" else self.n_heads

    @property
    def q_width(self) -> int:
        """Width of all heads of queries together."""
        return self.n_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all heads of keys together, and of values."""
        return self.n_kv_heads * self.head_width

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward between its projections."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int(self.d_model * self.expansion_ratio)

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.softmax_scale or 1 / math.sqrt(self.head_width)

    @property
    def logit_factor(self) -> float:
        """What logits are multiplied by."""
        if self.logit_scale == "inv_sqrt_d_model":
            return 1 / math.sqrt(self.d_model)
        return 1.0 if self.logit_scale is None else self.logit_scale

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What each block sees and whose keys it reads, in their order."""
        if self.block_overrides is None:
            return (Layer(self.window),) * self.n_layers
        return self.block_overrides.layers(self.window)

    @property
    def window(self) -> int | None:
        """Tokens before itself that a token sees where a block says nothing else; None: all."""
        return None if self.sliding_window_size == -1 else self.sliding_window_size

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong within this section."""
        wrong = list(self._bad_numbers())
        yield from wrong
        if not wrong:
            yield from self._bad_attention()
            yield from self._bad_positions()
            yield from self._bad_blocks()
        yield from self.rope_hf_config.problems(self.rope, self.max_seq_len)
        yield from self.init_config.problems()

    def _bad_numbers(self) -> Iterator[Problem]:
        for key in _COUNTS:
            value, least = getattr(self, key), 2 if key in ("max_seq_len", "vocab_size") else 1
            if value is not None and value < least:
                yield Problem(f"model.{key}", f"{value} is too small; the least is {least}.")
        if self.alibi_bias_max > _GENTLEST:
            what = f"{self.alibi_bias_max} is too large; the most is {_GENTLEST}."
            yield Problem("model.alibi_bias_max", what)
        if self.ffn_hidden_size is None and not 1 <= self.d_model * self.expansion_ratio < math.inf:
            yield Problem(
                "model.expansion_ratio",
                f"{self.expansion_ratio:g} times d_model {self.d_model} is no width.",
            )
        for key in _PROBABILITIES:
            if not 0.0 <= getattr(self, key) < 1.0:
                yield Problem(
                    f"model.{key}", f"{getattr(self, key)} is not a probability in [0, 1)."
                )
        for key in _POSITIVE:
            value = getattr(self, key)
            if value is not None and not 0.0 < value < math.inf:
                off = (
                    "; null is off" if type(self).__dataclass_fields__[key].default is None else ""
                )
                yield Problem(f"model.{key}", f"{value} is not a positive number{off}.")
        if not 0.0 < self.embedding_fraction <= 1.0:
            yield Problem(
                "model.embedding_fraction", f"{self.embedding_fraction} is not in (0, 1]."
            )
        factor = self.logit_scale
        if isinstance(factor, float) and not 0.0 < abs(factor) < math.inf:
            yield Problem("model.logit_scale", f"{factor} leaves no logits; null is off.")
        if self.sliding_window_size != -1 and self.sliding_window_size < 1:
            yield Problem(
                "model.sliding_window_size", f"{self.sliding_window_size} is no window; -1 is off."
            )

    def _bad_attention(self) -> Iterator[Problem]:
        if self.head_dim is None and self.d_model % self.n_heads:
            below = max(self.n_heads, self.d_model // self.n_heads * self.n_heads)
            yield Problem(
                "model.n_heads",
                f"{self.n_heads} heads do not divide d_model {self.d_model}.",
                f"use d_model {below} or {below + self.n_heads}, or another head count.",
            )
        if self.n_heads % self.n_kv_heads:
            yield Problem(
                "model.kv_n_heads",
                f"{self.n_kv_heads} heads of keys do not divide {self.n_heads} heads of queries.",
            )
        fits = {
            None: True,
            "multihead_attention": self.n_kv_heads == self.n_heads,
            "multiquery_attention": self.n_kv_heads == 1,
            "grouped_query_attention": self.kv_n_heads is not None,
        }
        if not fits[self.attn_type]:
            yield Problem(
                "model.attn_type",
                f"{self.attn_type} does not go with {self.n_kv_heads} heads of keys "
                f"for {self.n_heads} of queries.",
                "set kv_n_heads, and drop attn_type.",
            )
        if self.qk_ln and self.qk_gn:
            yield Problem("model.qk_gn", "qk_ln is on as well; at most one of the two can be.")

    def _bad_positions(self) -> Iterator[Problem]:
        if self.alibi and (self.rope or self.learned_pos_emb):
            other = "rope" if self.rope else "learned_pos_emb"
            yield Problem(
                f"model.{other}", "alibi is on as well, as it is by default.", "add `alibi: false`."
            )
        elif self.rope and self.learned_pos_emb:
            yield Problem("model.learned_pos_emb", "rope is on as well; choose one.")
        if self.rope and self.head_width % 2:
            yield Problem("model.rope", f"a head of odd width {self.head_width} has no pairs.")

    def _bad_blocks(self) -> Iterator[Problem]:
        if self.block_overrides is not None:
            yield from self.block_overrides.problems(self.n_layers)
