"""The MPT forward pass, in reading order: embedding, blocks, norm, tied head.

Parameter names are Hugging Face's own (`transformer.blocks.0.attn.Wqkv.weight`), so that an
exported file needs no renaming. Tensor letters: B batch, S sequence, D d_model, H heads, V vocab.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mpt.model.attend import Backend, attend_with
from mpt.model.embedding import look_up
from mpt.model.head import summed_nats
from mpt.model.position import alibi_slopes
from mpt.recipe.model import Model

NORM_EPS = 1e-5


class MPT(nn.Module):
    """A decoder-only language model: tokens in, logits or loss out.

    Source:
        MosaicML, MPT-7B, 2023, and its Hugging Face port in transformers (`MptForCausalLM`).
    """

    def __init__(self, cfg: Model, attention: Backend = "sdpa") -> None:
        super().__init__()
        self.transformer = Transformer(cfg, attention)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (B, S, V), or with targets (B, S) their nats summed, () fp32.

        The loss is computed in here, not outside, so that the tied embedding is whole (FSDP
        gathers it for this module's forward pass) and no tensor of all logits is made.
        """
        hidden = self.transformer(tokens)  # (B, S, D)
        if targets is None:
            return F.linear(hidden, self.transformer.wte.weight)
        return summed_nats(hidden, self.transformer.wte.weight, targets)


class Transformer(nn.Module):
    """Everything below the head."""

    def __init__(self, cfg: Model, attention: Backend) -> None:
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.emb_drop = nn.Dropout(cfg.emb_pdrop)
        self.blocks = nn.ModuleList(Block(cfg, attention) for _ in range(cfg.n_layers))
        self.norm_f = nn.LayerNorm(cfg.d_model, eps=NORM_EPS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, S) -> (B, S, D)
        x = self.emb_drop(look_up(tokens, self.wte.weight))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm_f(x)
        return out


class Block(nn.Module):
    """Pre-norm decoder block: x + attn(norm_1(x)), then x + ffn(norm_2(x))."""

    def __init__(self, cfg: Model, attention: Backend) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(cfg.d_model, eps=NORM_EPS, bias=False)
        self.attn = Attention(cfg, attention)
        self.norm_2 = nn.LayerNorm(cfg.d_model, eps=NORM_EPS, bias=False)
        self.ffn = FeedForward(cfg)
        self.resid_drop = nn.Dropout(cfg.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        x = x + self.resid_drop(self.attn(self.norm_1(x)))
        out: Tensor = x + self.resid_drop(self.ffn(self.norm_2(x)))
        return out


class Attention(nn.Module):
    """Multi-head causal attention with ALiBi and one fused projection."""

    slopes: Tensor

    def __init__(self, cfg: Model, attention: Backend) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.clip_qkv = cfg.clip_qkv
        self.scale = cfg.softmax_scale or 1 / math.sqrt(cfg.head_dim)
        self.attn_pdrop = cfg.attn_pdrop
        self.attend = attend_with(attention)
        self.Wqkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=False)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        # Not persistent: checkpoints store no slopes. init.py fills it after a meta-device build.
        self.alibi = (cfg.n_heads, cfg.alibi_bias_max)
        self.register_buffer("slopes", alibi_slopes(*self.alibi), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        qkv = self.Wqkv(x)  # (B, S, 3 D)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, S, head_dim)
            for t in qkv.chunk(3, dim=-1)
        )
        dropout = self.attn_pdrop if self.training else 0.0
        out = self.attend(q, k, v, self.slopes, self.scale, dropout)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(-2))
        return projected


class FeedForward(nn.Module):
    """Two projections with an exact GELU between them."""

    def __init__(self, cfg: Model) -> None:
        super().__init__()
        width = cfg.expansion_ratio * cfg.d_model
        self.up_proj = nn.Linear(cfg.d_model, width, bias=False)
        self.down_proj = nn.Linear(width, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        out: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return out
