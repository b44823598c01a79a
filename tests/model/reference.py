"""MPT once more, written plainly: one function over named weights, in float64, without a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpt.recipe.model import Model

Weights = dict[str, Tensor]


def logits(cfg: Model, weights: Weights, tokens: Tensor, documents: Tensor) -> Tensor:
    """Return (B, S, V) in float64; a sample's documents are read as if each stood alone."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    out = torch.zeros(*tokens.shape, cfg.vocab_size, dtype=torch.float64)
    for sample in range(tokens.shape[0]):
        for document in documents[sample].unique():
            mine = documents[sample] == document
            out[sample, mine] = _document(cfg, w, tokens[sample, mine])
    return out


def _document(cfg: Model, w: Weights, tokens: Tensor) -> Tensor:
    x = w["transformer.wte.weight"][tokens]  # (S, D)
    if cfg.learned_pos_emb:
        x = x + w["transformer.wpe.weight"][: len(tokens)]
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for i, layer in enumerate(cfg.layers):
        name = f"transformer.blocks.{i}"
        read = _norm(cfg, w, f"{name}.norm_1", x)
        if layer.kv_from is None:
            q, k, v = _linear(w, f"{name}.attn.Wqkv", read, cfg.clip_qkv).split(
                [cfg.q_width, cfg.kv_width, cfg.kv_width], dim=-1
            )
            kept[i] = (_heads(cfg, w, f"{name}.attn.k_ln", k), _heads(cfg, w, "", v))
        else:
            q = _linear(w, f"{name}.attn.Wq", read, cfg.clip_qkv)
        q = _heads(cfg, w, f"{name}.attn.q_ln", q)
        k, v = kept[i if layer.kv_from is None else layer.kv_from]
        seen = torch.cat([_head(cfg, h, q, k, v, layer.window) for h in range(cfg.n_heads)], dim=-1)
        x = x + _linear(w, f"{name}.attn.out_proj", seen)
        x = x + _feed_forward(cfg, w, f"{name}.ffn", _norm(cfg, w, f"{name}.norm_2", x))
    x = _norm(cfg, w, "transformer.norm_f", x)
    head = "transformer.wte.weight" if cfg.tie_word_embeddings else "lm_head.weight"
    out = x @ w[head].T * (1.0 if cfg.logit_scale is None else cfg.logit_factor)
    cap = cfg.final_logit_softcapping
    return out if cap is None else cap * torch.tanh(out / cap)


def _head(cfg: Model, h: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One head, token by token: (S, head_width)."""
    group = h // (cfg.n_heads // cfg.n_kv_heads)
    scale = cfg.softmax_scale or 1 / math.sqrt(q.shape[-1])
    rows = []
    for i in range(q.shape[1]):
        first = 0 if window is None else max(0, i - window)
        scores = (k[group, first : i + 1] @ q[h, i]) * scale
        if cfg.attn_logit_softcapping is not None:
            cap = cfg.attn_logit_softcapping
            scores = cap * torch.tanh(scores / cap)
        if cfg.alibi:
            scores = scores - _slope(cfg, h) * torch.arange(i - first, -1, -1)
        rows.append(torch.softmax(scores, dim=0) @ v[group, first : i + 1])
    return torch.stack(rows)


def _slope(cfg: Model, h: int) -> float:
    """By the paper: powers of 2^(-max / H'), for the next power of two H', odd ones first."""
    power = 1
    while power < cfg.n_heads:
        power *= 2
    exponents = list(range(1, power + 1))
    if power != cfg.n_heads:
        exponents = exponents[1::2] + exponents[0::2]
    return float(2.0 ** (-exponents[h] * cfg.alibi_bias_max / power))


def _heads(cfg: Model, w: Weights, norm: str, x: Tensor) -> Tensor:
    """(S, h * width) -> (h, S, width), normalised and rotated if `norm` names what it may be."""
    width = cfg.head_width
    if norm and cfg.qk_ln:
        x = _norm(cfg, w, norm, x)
    x = x.reshape(len(x), -1, width)
    if norm and cfg.qk_gn:
        x = _norm(cfg, w, norm, x)
    x = x.transpose(0, 1)
    if not norm or not cfg.rope:
        return x
    pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :])
    speeds = cfg.rope_theta ** (-torch.arange(width // 2).double() * 2 / width)
    if cfg.rope_hf_config.type == "linear":
        speeds = speeds / cfg.rope_hf_config.factor
    angles = torch.arange(x.shape[1])[:, None] * speeds
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _feed_forward(cfg: Model, w: Weights, name: str, x: Tensor) -> Tensor:
    act = {
        "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / math.sqrt(2))),
        "gelu_tanh": lambda t: (
            t * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))
        ),
        "relu": lambda t: t.clamp(min=0),
        "silu": lambda t: t / (1 + torch.exp(-t)),
        "mish": lambda t: t * torch.tanh(torch.log1p(torch.exp(t))),
        "elu": lambda t: torch.where(t > 0, t, torch.exp(t) - 1),
        "tanh": torch.tanh,
    }[cfg.act_fn]
    up = _linear(w, f"{name}.up_proj", x)
    gated = cfg.ffn_type == "mptglu"
    between = act(_linear(w, f"{name}.gate_proj", x)) * up if gated else act(up)
    return _linear(w, f"{name}.down_proj", between)


def _linear(w: Weights, name: str, x: Tensor, clip: float | None = None) -> Tensor:
    out = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))
    return out if clip is None else out.clamp(-clip, clip)


def _norm(cfg: Model, w: Weights, name: str, x: Tensor) -> Tensor:
    if cfg.norm_type.endswith("layernorm"):
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + cfg.norm_eps)
    return x * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(()))
