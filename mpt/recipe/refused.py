"""Options of MPT elsewhere that this trainer does not have: each is known, and refused by name."""

from __future__ import annotations

_MOE = "is an option of mixtures of experts, which are not part of this trainer."
_TE = "is Transformer Engine's, which is not part of this trainer"
_FLAT = "is not a section here; its keys go directly under `model:`."
_BY_ITSELF = "is not a choice here, it follows from the machine; drop it."
_ONE_WAY = "is not a choice here: there is one way to compute it; drop it."

REFUSED: dict[str, str] = {
    "attn_config": _FLAT,
    "attn_impl": "is not part of the model here, for it changes no number: see `train.attention`.",
    "fc_type": _BY_ITSELF,
    "ffn_act_fn": "is spelled `act_fn`, with the name alone, such as gelu or gelu_tanh.",
    "ffn_config": _FLAT,
    "flash_attn_impl": _BY_ITSELF,
    "fused_qkv": _ONE_WAY,
    "init": "is spelled `init_config: {name: ...}`.",
    "init_device": _BY_ITSELF,
    "kv_dim": "is not part of this trainer; there is no cross-attention.",
    "moe_loss_weight": _MOE,
    "moe_num_experts": _MOE,
    "moe_top_k": _MOE,
    "moe_world_size": _MOE,
    "prefix_lm": "is not part of this trainer; attention is causal.",
    "rope_dail_config": "is not a choice here; `rope_hf_config` scales, `rope_theta` is the base.",
    "rope_impl": _ONE_WAY,
    "use_cache": "is a matter of generation, not of a recipe; drop it.",
    "use_pad_tok_in_ffn": "is not a choice here: samples are packed and hold no padding; drop it.",
    "verbose": _BY_ITSELF,
}
"""Keys, with what to do instead."""

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "ffn_type": {
        "mb_dmoe": _MOE,
        "mb_moe": _MOE,
        "mptgeglu": "is spelled `ffn_type: mptglu` with `act_fn: gelu`.",
        "te_ln_mlp": f"{_TE}; use mptmlp.",
        "torch_dmoe": _MOE,
    },
    "norm_type": {
        "triton_rmsnorm": "is a kernel, not a norm; use rmsnorm.",
        "te_layernorm": f"{_TE}; use layernorm.",
        "te_rmsnorm": f"{_TE}; use rmsnorm.",
    },
}
"""Values of keys that are here, with what to do instead."""
