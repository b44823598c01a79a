"""Which of transformers' models computes ours, if any, and the config.json that says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mpt.errors import UsageError
from mpt.hf.names import Architecture
from mpt.recipe.layers import Layer
from mpt.recipe.model import Activation, Model
from mpt.recipe.rope import RopeScaling

LLAMA_ACTIVATIONS: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "mish": "mish",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
"""What transformers calls our activations; it has no elu."""

TRAINING_ONLY = (
    "attn_pdrop",
    "attn_uses_sequence_id",
    "emb_pdrop",
    "embedding_fraction",
    "init_config",
    "resid_pdrop",
)
"""Options that change no logit of a document: they are in no one's way."""

_NAMES: dict[Architecture, str] = {"mpt": "MPT", "llama": "Llama"}


def expressible(model: Model) -> tuple[Architecture | None, tuple[str, ...]]:
    """Return what transformers can run the model as, or None and every option in the way."""
    reasons: list[str] = []
    for architecture, name in _NAMES.items():
        wrong = list(_in_the_way(model, architecture))
        if not wrong:
            return architecture, ()
        reasons += [f"as {name}: model.{key}: {why}" for key, why in wrong]
    return None, tuple(reasons)


def unsupported(model: Model) -> list[str]:
    """Return why neither MPT nor Llama of transformers computes the model; empty if one does."""
    return list(expressible(model)[1])


def config_json(model: Model, *, dtype: str, eod_id: int | None) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        dtype: torch's name of the stored weights' type, such as "float32".
        eod_id: the token that ends a document, if the tokenizer is known.

    Raises:
        UsageError: if transformers would not compute this model; names every option at once.
    """
    architecture, reasons = expressible(model)
    shared = {
        "model_type": architecture,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eod_id,
    }
    match architecture:
        case "mpt":
            return {"architectures": ["MptForCausalLM"], **shared, **_mpt(model)}
        case "llama":
            return {"architectures": ["LlamaForCausalLM"], **shared, **_llama(model)}
    raise UsageError(
        "transformers can run this model neither as MPT nor as Llama, so it is not exported:\n  "
        + "\n  ".join(reasons)
    )


def _in_the_way(model: Model, architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Yield the options that one architecture would ignore or refuse, and why.

    transformers' MPT reads other values of many of these without a word, and computes as if they
    were not there (seen in transformers 5.23).
    """
    yield from _in_the_way_of_both(model)
    name = _NAMES[architecture]
    for key, fits, has in _MPT(model) if architecture == "mpt" else _LLAMA(model):
        if not fits:
            yield key, f"is {getattr(model, key)!r}, and transformers' {name} has {has}."


def _in_the_way_of_both(model: Model) -> Iterator[tuple[str, str]]:
    for key in ("qk_ln", "qk_gn", "learned_pos_emb"):
        if getattr(model, key):
            yield key, "is something transformers has not."
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(model, key) is not None:
            yield key, "is something transformers has not."
    if model.logit_factor != 1.0:
        yield "logit_scale", f"is {model.logit_scale!r}, and transformers scales no logits."
    kinds = {Layer(model.window)} if model.block_overrides is None else set(model.layers)
    if len(kinds) > 1:  # which is so, too, where one borrows: the first one cannot
        yield "block_overrides", "blocks differ, and transformers' are all alike."
    elif (window := kinds.pop().window) is not None:
        key = "sliding_window_size" if model.block_overrides is None else "block_overrides"
        yield key, f"a window of {window} tokens is nothing transformers has."


def _MPT(model: Model) -> Iterator[tuple[str, bool, str]]:  # noqa: N802 - as the model is called
    """Yield each option that matters to transformers' MPT, whether it fits, and what would."""
    heads = f"all of its {model.n_heads} heads"
    yield "alibi", model.alibi, "ALiBi always"
    yield "alibi_bias_max", not model.alibi or model.alibi_bias_max == 8, "8"
    yield "rope", not model.rope, "ALiBi always"
    yield "kv_n_heads", model.n_kv_heads == model.n_heads, f"keys and values for {heads}"
    yield "head_dim", model.q_width == model.d_model, "d_model / n_heads"
    yield "ffn_type", model.ffn_type == "mptmlp", "mptmlp"
    yield from _width_of_mpt(model)
    yield "act_fn", model.act_fn == "gelu", "gelu"
    yield "norm_type", model.norm_type.endswith("layernorm"), "layernorm"
    yield "no_bias", model.no_bias, "no biases"
    yield "attention_bias", not model.attention_bias, "no biases"


def _width_of_mpt(model: Model) -> Iterator[tuple[str, bool, str]]:
    fits = model.ffn_width == 4 * model.d_model
    if model.ffn_hidden_size is None:
        yield "expansion_ratio", fits, "4"
    else:
        yield "ffn_hidden_size", fits, f"4 * d_model = {4 * model.d_model}"


def _LLAMA(model: Model) -> Iterator[tuple[str, bool, str]]:  # noqa: N802
    """Yield each option that matters to transformers' Llama, whether it fits, and what would."""
    same_scale = model.scale == model.head_width**-0.5 or model.softmax_scale is None
    yield "alibi", not model.alibi, "RoPE always"
    yield "rope", model.rope, "RoPE always"
    yield "clip_qkv", model.clip_qkv is None, "no clipping"
    yield "softmax_scale", same_scale, "1/sqrt(head_dim)"
    yield "ffn_type", model.ffn_type == "mptglu", "mptglu"
    yield "act_fn", model.act_fn in LLAMA_ACTIVATIONS, f"one of {', '.join(LLAMA_ACTIVATIONS)}"
    yield "norm_type", model.norm_type.endswith("rmsnorm"), "rmsnorm"
    # Its attention_bias gives out_proj one as well.
    only_qkv = model.attention_bias and model.no_bias
    yield "attention_bias", not only_qkv, "biases on all projections of attention or on none"
    yield "n_heads", model.d_model % model.n_heads == 0, "a count that divides d_model"


def _mpt(model: Model) -> dict[str, Any]:
    return {
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "n_layers": model.n_layers,
        "expansion_ratio": 4,
        "max_seq_len": model.max_seq_len,
        "emb_pdrop": model.emb_pdrop,
        "resid_pdrop": model.resid_pdrop,
        "layer_norm_epsilon": model.norm_eps,
        "norm_type": model.norm_type,
        "learned_pos_emb": False,
        "logit_scale": None,
        "no_bias": True,
        "embedding_fraction": model.embedding_fraction,
        "attn_config": {
            "attn_type": "multihead_attention",
            "attn_pdrop": 0,  # transformers' strict config takes whole numbers only
            "attn_impl": "torch",
            "clip_qkv": model.clip_qkv,
            "softmax_scale": model.softmax_scale,
            "prefix_lm": False,
            "qk_ln": False,
            "attn_uses_sequence_id": False,
            "alibi": True,
            "alibi_bias_max": model.alibi_bias_max,
        },
    }


def _llama(model: Model) -> dict[str, Any]:
    return {
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_width,
        "hidden_act": LLAMA_ACTIVATIONS[model.act_fn],
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "attention_bias": not model.no_bias,
        "attention_dropout": model.attn_pdrop,
        "mlp_bias": not model.no_bias,
        "rope_parameters": _rope(model.rope_hf_config) | {"rope_theta": model.rope_theta},
    }


def _rope(scaling: RopeScaling) -> dict[str, Any]:
    match scaling.type:
        case "no_scaling":
            return {"rope_type": "default"}
        case "llama3":
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        case _:
            return {"rope_type": scaling.type, "factor": scaling.factor}
