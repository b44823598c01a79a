"""The MPT forward pass, in reading order: embedding, blocks, norm, head.

Parameter names are Hugging Face's own (`transformer.blocks.0.attn.Wqkv.weight`), so that an
exported file needs no renaming. Tensor letters: B batch, S sequence, D d_model, H heads, V vocab;
T tokens that are looked at: S of them are new, the others lie in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mpt.model.attend import Backend, Scores, attend_with, block_masks
from mpt.model.cache import Cache
from mpt.model.embedding import look_up
from mpt.model.head import ChunkCost, LogitForm, chunk_cost, summed_loss
from mpt.model.position import alibi_slopes, places, rotate, rotations
from mpt.model.recompute import recomputed
from mpt.recipe.activations import Recompute
from mpt.recipe.layers import Layer
from mpt.recipe.model import Activation, Model
from mpt.state import Loss

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Sight(NamedTuple):
    """What all blocks of one forward pass are told of positions and documents."""

    slopes: Tensor | None
    """(H,) fp32: ALiBi's, if there is ALiBi."""
    rotation: tuple[Tensor, Tensor] | None
    """RoPE's cosines and sines, (S, head_width) fp32 each, if there is RoPE."""
    documents: Tensor | None
    """(B, T) int64: tokens of other documents are not seen. None: all are of one."""
    mask: BlockMask | None = None
    """What FlexAttention wants to know beforehand; another one for each size of window."""


KeysValues = tuple[Tensor, Tensor]  # 2 x (B, n_kv_heads, T, head_width)


class MPT(nn.Module):
    """A decoder-only language model: tokens in, logits or loss out.

    Source:
        MosaicML, MPT-7B, 2023, and its Hugging Face port in transformers (`MptForCausalLM`);
        options that the port lacks are as in llm-foundry.
    """

    def __init__(
        self,
        cfg: Model,
        attention: Backend = "sdpa",
        z_loss: float = 0.0,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.transformer = Transformer(cfg, attention, recompute)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.tied = cfg.tie_word_embeddings
        self.form = LogitForm(cfg.logit_factor, cfg.final_logit_softcapping, z_loss)
        self.chunk_cost: ChunkCost = chunk_cost

    def compile_parts(self) -> None:
        """Have torch.compile make kernels of each block and of the loss, before they first run.

        Never dynamic: what is computed must hang on the shape at hand alone, not on which others
        were seen before it, or a probe or an evaluation would change a run's bits.
        """
        # Blocks share their code: each window, and training and evaluation, is a variant of it.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.transformer.blocks:
            block.compile(fullgraph=True, dynamic=False)
        self.chunk_cost = torch.compile(chunk_cost, fullgraph=True, dynamic=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor | Loss:
        """Return logits (B, S, V), or with targets (B, S) the loss summed over them.

        The loss is computed in here, not outside, so that the tied embedding is whole (FSDP
        gathers it for this module's forward pass) and no tensor of all logits is made.

        Args:
            tokens: (B, S) int64.
            targets: (B, S) int64; IGNORE takes no loss.
            documents: (B, S) int64, ids of the documents that do not see each other.
            cache: holds what was read before, and takes on what is read now.
        """
        hidden = self.transformer(tokens, documents, cache)  # (B, S, D)
        if targets is None:
            return self.logits(hidden)
        return summed_loss(hidden, self.head, targets, self.form, self.chunk_cost)

    def logits(self, hidden: Tensor) -> Tensor:  # (B, S, D) -> (B, S, V)
        """Return the logits at some positions."""
        return self.form.apply(F.linear(hidden, self.head))

    @property
    def head(self) -> Tensor:
        """The head's weight, (V, D)."""
        return self.transformer.wte.weight if self.tied else self.lm_head.weight


class Transformer(nn.Module):
    """Everything below the head."""

    def __init__(self, cfg: Model, attention: Backend, recompute: Recompute) -> None:
        super().__init__()
        self.cfg, self.attention = cfg, attention
        self.wte = nn.Embedding(cfg.vocab_size, cfg.d_model)
        if cfg.learned_pos_emb:
            self.wpe = nn.Embedding(cfg.max_seq_len, cfg.d_model)
        self.emb_drop = nn.Dropout(cfg.emb_pdrop)
        lenders = {layer.kv_from for layer in cfg.layers}
        self.blocks = nn.ModuleList(
            Block(cfg, layer, attention, recompute, lends=number in lenders)
            for number, layer in enumerate(cfg.layers)
        )
        self.norm_f = Norm(cfg, cfg.d_model)

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:  # (B, S) -> (B, S, D)
        start = 0 if cache is None else cache.length
        stop = start + tokens.shape[1]
        if cache is not None:
            documents = cache.see(documents, tokens.shape[1])  # (B, T)
        x = self._embed(tokens, documents, start)
        sight = self._sight(documents, start, stop, x.device)
        masks = block_masks(self.attention, documents, start, stop, self.windows, x.device)
        lent: dict[int, KeysValues] = {}
        for number, (block, layer) in enumerate(zip(self.blocks, self.cfg.layers, strict=True)):
            borrowed = None if layer.kv_from is None else lent[layer.kv_from]
            store = None if cache is None else partial(cache.append, number)
            x, lends = block(x, sight._replace(mask=masks.get(layer.window)), borrowed, store)
            if lends is not None:
                lent[number] = lends
        if cache is not None:
            cache.advance(tokens.shape[1])
        out: Tensor = self.norm_f(x)
        return out

    @property
    def windows(self) -> set[int | None]:
        """The sizes of window that blocks have."""
        return {layer.window for layer in self.cfg.layers}

    def _embed(self, tokens: Tensor, documents: Tensor | None, start: int) -> Tensor:
        x = look_up(tokens, self.wte.weight)  # (B, S, D)
        if self.cfg.learned_pos_emb:
            if documents is None:
                at = torch.arange(start, start + tokens.shape[1], device=x.device).expand_as(tokens)
            else:
                at = places(documents)[:, start:]  # each document begins at position 0
            x = x + look_up(at, self.wpe.weight)
        if self.cfg.embedding_fraction != 1.0:
            x = x * self.cfg.embedding_fraction + x.detach() * (1 - self.cfg.embedding_fraction)
        dropped: Tensor = self.emb_drop(x)
        return dropped

    def _sight(
        self, documents: Tensor | None, start: int, stop: int, device: torch.device
    ) -> Sight:
        cfg = self.cfg
        slopes = alibi_slopes(cfg.n_heads, cfg.alibi_bias_max) if cfg.alibi else None
        return Sight(
            None if slopes is None else slopes.to(device, non_blocking=True),
            rotations(cfg, start, stop, device) if cfg.rope else None,
            documents,
        )


class Block(nn.Module):
    """Pre-norm decoder block: x + attn(norm_1(x)), then x + ffn(norm_2(x))."""

    def __init__(
        self, cfg: Model, layer: Layer, attention: Backend, recompute: Recompute, *, lends: bool
    ) -> None:
        super().__init__()
        self.lends, self.recompute = lends, recompute
        self.has_dropout = cfg.attn_pdrop > 0 or cfg.resid_pdrop > 0
        self.norm_1 = Norm(cfg, cfg.d_model)
        self.attn = Attention(cfg, layer, attention)
        self.norm_2 = Norm(cfg, cfg.d_model)
        self.ffn = FeedForward(cfg)
        self.resid_drop = nn.Dropout(cfg.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        borrowed: KeysValues | None = None,
        store: Callable[[Tensor, Tensor], KeysValues] | None = None,
    ) -> tuple[Tensor, KeysValues | None]:  # (B, S, D) -> (B, S, D), what later blocks borrow
        if not self.training:
            return self._through(x, sight, borrowed, store)
        assert store is None, "a cache is for reading, not for training"
        return recomputed(
            self.recompute, self._through, x, sight, borrowed, has_dropout=self.has_dropout
        )

    def _through(
        self,
        x: Tensor,
        sight: Sight,
        borrowed: KeysValues | None,
        store: Callable[[Tensor, Tensor], KeysValues] | None = None,
    ) -> tuple[Tensor, KeysValues | None]:
        seen, keys_values = self.attn(self.norm_1(x), sight, borrowed, store)
        x = x + self.resid_drop(seen)
        x = x + self.resid_drop(self.ffn(self.norm_2(x)))
        return x, keys_values if self.lends else None


class Attention(nn.Module):
    """Grouped-query causal attention with one fused projection; n_kv_heads = H is multi-head.

    A block that borrows keys and values of an earlier one has a projection for queries alone.
    """

    def __init__(self, cfg: Model, layer: Layer, attention: Backend) -> None:
        super().__init__()
        self.cfg, self.window, self.borrows = cfg, layer.window, layer.kv_from is not None
        self.attend = attend_with(attention)
        bias = cfg.attention_bias or not cfg.no_bias
        self.splits = [cfg.q_width] if self.borrows else [cfg.q_width, cfg.kv_width, cfg.kv_width]
        if self.borrows:
            self.Wq = nn.Linear(cfg.d_model, cfg.q_width, bias=bias)
        else:
            self.Wqkv = nn.Linear(cfg.d_model, sum(self.splits), bias=bias)
        if cfg.qk_ln or cfg.qk_gn:
            self.q_ln = Norm(cfg, cfg.head_width if cfg.qk_gn else cfg.q_width)
            if not self.borrows:
                self.k_ln = Norm(cfg, cfg.head_width if cfg.qk_gn else cfg.kv_width)
        self.out_proj = nn.Linear(cfg.q_width, cfg.d_model, bias=not cfg.no_bias)

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        borrowed: KeysValues | None,
        store: Callable[[Tensor, Tensor], KeysValues] | None,
    ) -> tuple[Tensor, KeysValues]:  # (B, S, D) -> (B, S, D), keys and values
        cfg = self.cfg
        projected = self.Wq(x) if self.borrows else self.Wqkv(x)
        if cfg.clip_qkv is not None:
            projected = projected.clamp(-cfg.clip_qkv, cfg.clip_qkv)
        q, *kv = projected.split(self.splits, dim=-1)
        q = self._heads(q, getattr(self, "q_ln", None), sight.rotation)
        if borrowed is not None:
            k, v = borrowed
        else:
            k = self._heads(kv[0], getattr(self, "k_ln", None), sight.rotation)
            v = self._heads(kv[1], None, None)
            if store is not None:
                k, v = store(k, v)
        scores = Scores(
            scale=cfg.scale,
            slopes=sight.slopes,
            softcap=cfg.attn_logit_softcapping,
            window=self.window,
            documents=sight.documents,
            dropout=cfg.attn_pdrop if self.training else 0.0,
            mask=sight.mask,
        )
        out = self.attend(q, k, v, scores)  # (B, H, S, head_width)
        return self.out_proj(out.transpose(1, 2).flatten(-2)), (k, v)

    def _heads(
        self, x: Tensor, norm: Norm | None, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:  # (B, S, h * head_width) -> (B, h, S, head_width)
        if norm is not None and self.cfg.qk_ln:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.cfg.head_width))
        if norm is not None and self.cfg.qk_gn:
            x = norm(x)
        x = x.transpose(1, 2)
        return x if rotation is None else rotate(x, rotation)


class FeedForward(nn.Module):
    """Two projections with an activation between them, or a gated one (GLU)."""

    def __init__(self, cfg: Model) -> None:
        super().__init__()
        self.act, self.gated = ACTIVATIONS[cfg.act_fn], cfg.ffn_type == "mptglu"
        bias = not cfg.no_bias
        self.up_proj = nn.Linear(cfg.d_model, cfg.ffn_width, bias=bias)
        if self.gated:
            self.gate_proj = nn.Linear(cfg.d_model, cfg.ffn_width, bias=bias)
        self.down_proj = nn.Linear(cfg.ffn_width, cfg.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        up = self.up_proj(x)  # (B, S, ffn_width)
        between = self.act(self.gate_proj(x)) * up if self.gated else self.act(up)
        out: Tensor = self.down_proj(between)
        return out


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension.

    Torch's kernels compute in fp32 inside, whatever the dtype, and round once: so the
    low-precision norms of MPT, which exist to read and write the compute dtype, are the same.
    """

    def __init__(self, cfg: Model, width: int) -> None:
        super().__init__()
        self.eps = cfg.norm_eps
        self.centred = cfg.norm_type.endswith("layernorm")
        self.weight = nn.Parameter(torch.ones(width))
        has_bias = self.centred and not cfg.no_bias
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        shape = self.weight.shape
        if self.centred:
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, shape, self.weight, self.eps)
