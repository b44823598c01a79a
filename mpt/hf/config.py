"""Our `model:` section as transformers' MptConfig and back, refusing what does not carry over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mpt.errors import CheckpointError, UsageError
from mpt.recipe.model import FIXED, Model

NORM_EPS: float = FIXED["norm_eps"]

_WRITTEN = (
    "d_model",
    "n_heads",
    "n_layers",
    "max_seq_len",
    "vocab_size",
    "emb_pdrop",
    "resid_pdrop",
    "clip_qkv",
    "softmax_scale",
    "norm_eps",
)
"""Options that transformers obeys. (Dropouts do not act in an exported model unless trained on,
and then transformers takes attn_pdrop for all of them.)"""

_TRAINING_ONLY = ("attn_pdrop", "init")
"""Options without effect on the logits, which transformers has no place for: its strict config
takes a whole number for attn_pdrop, so 0 is written."""

_OBEYED: dict[str, Any] = {
    "act_fn": "gelu",
    "alibi": True,
    "alibi_bias_max": 8,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "block_overrides": None,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "ffn_hidden_size": None,
    "ffn_type": "mptmlp",
    "final_logit_softcapping": None,
    "head_dim": None,
    "kv_n_heads": None,
    "learned_pos_emb": False,
    "logit_scale": None,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "qk_gn": False,
    "qk_ln": False,
    "rope": False,
    "sliding_window_size": -1,
    "tie_word_embeddings": True,
}
"""The one value of each option that transformers' MPT computes. It reads other values of some of
these without a word and goes on as if they were not there (seen in transformers 5.23)."""

_INERT = {
    "_name_or_path",
    "architectures",
    "attn_impl",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "init_device",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def unsupported(model: Model) -> list[str]:
    """Return what transformers would compute differently, a sentence per option; none is good."""
    settings = FIXED | asdict(model)
    found = [
        f"model.{key}: {settings[key]!r} would be silently taken for {value!r}"
        for key, value in _OBEYED.items()
        if settings.get(key, value) != value
    ]
    unknown = settings.keys() - _OBEYED.keys() - set(_WRITTEN) - set(_TRAINING_ONLY)
    return found + [f"model.{key}: is not known to the export" for key in sorted(unknown)]


def config_json(model: Model, *, dtype: str, eod_id: int | None) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        dtype: torch's name of the stored weights' type, such as "float32".
        eod_id: the token that ends a document, if the tokenizer is known.

    Raises:
        UsageError: if transformers would not compute this model; names every option at once.
    """
    if reasons := unsupported(model):
        raise UsageError(
            "transformers' MPT cannot run this model, so it is not exported:\n  "
            + "\n  ".join(reasons)
        )
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "dtype": dtype,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "n_layers": model.n_layers,
        "expansion_ratio": model.expansion_ratio,
        "max_seq_len": model.max_seq_len,
        "vocab_size": model.vocab_size,
        "emb_pdrop": model.emb_pdrop,
        "resid_pdrop": model.resid_pdrop,
        "layer_norm_epsilon": NORM_EPS,
        "norm_type": FIXED["norm_type"],
        "learned_pos_emb": False,
        "logit_scale": None,
        "no_bias": True,
        "embedding_fraction": 1.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "eos_token_id": eod_id,
        "attn_config": {
            "attn_type": "multihead_attention",
            "attn_pdrop": 0,
            "attn_impl": "torch",
            "clip_qkv": None if model.clip_qkv is None else float(model.clip_qkv),
            "softmax_scale": None if model.softmax_scale is None else float(model.softmax_scale),
            "prefix_lm": False,
            "qk_ln": False,
            "attn_uses_sequence_id": False,
            "alibi": True,
            "alibi_bias_max": model.alibi_bias_max,
        },
    }


def model_from_config(config: dict[str, Any]) -> Model:
    """Return the `model:` section that a config.json describes; it may come from a stranger.

    Raises:
        CheckpointError: if it is not MPT's, or has an option that is not built here; names all.
    """
    if config.get("model_type") != "mpt":
        raise CheckpointError(
            f"config.json: model_type is {config.get('model_type')!r}, not 'mpt'."
        )
    attention = config.get("attn_config") or {}
    if not isinstance(attention, dict):
        raise CheckpointError("config.json: attn_config is not a mapping.")
    given = {key: value for key, value in config.items() if key != "attn_config"}
    for key in attention.keys() - _INERT:
        if given.setdefault(key, attention[key]) != attention[key]:
            raise CheckpointError(
                f"config.json: {key}: is {given[key]!r}, and {attention[key]!r} in attn_config."
            )
    given["norm_eps"] = given.pop("layer_norm_epsilon", NORM_EPS)
    if problems := list(_bad_options(given)):
        raise CheckpointError("config.json: " + " ".join(problems))
    model = Model(**{key: given[key] for key in _CARRIED if key in given})
    if bad_values := [f"{problem.key}: {problem.what}" for problem in model.problems()]:
        raise CheckpointError("config.json: " + " ".join(bad_values))
    return model


_INTEGERS = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")
_NUMBERS = ("emb_pdrop", "resid_pdrop", "attn_pdrop")
_NUMBERS_OR_NONE = ("clip_qkv", "softmax_scale")
_CARRIED = (*_INTEGERS, *_NUMBERS, *_NUMBERS_OR_NONE)


def _bad_options(given: dict[str, Any]) -> Iterator[str]:
    for key in _INTEGERS:
        if type(given.get(key)) is not int:
            yield f"{key}: {given.get(key)!r} is not a whole number."
    for key in (*_NUMBERS, *_NUMBERS_OR_NONE):
        value = given.get(key, 0.0)
        if type(value) not in (int, float) and not (value is None and key in _NUMBERS_OR_NONE):
            yield f"{key}: {value!r} is not a number."
    fixed = {"norm_eps": NORM_EPS, "prefix_lm": False, **_OBEYED}
    for key in sorted(given.keys() - set(_CARRIED) - _INERT):
        if key not in fixed:
            yield f"{key}: is not an option that is known here."
        elif given[key] != fixed[key]:
            yield f"{key}: {given[key]!r} is not built; {fixed[key]!r} is."
