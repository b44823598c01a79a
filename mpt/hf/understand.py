"""A config.json of MPT or Llama as our `model:` section: each key mapped, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpt.errors import CheckpointError, RecipeError
from mpt.hf.config import LLAMA_ACTIVATIONS
from mpt.hf.names import Architecture
from mpt.recipe.model import Model
from mpt.recipe.plain import model_from

Values = dict[str, Any]

_INERT = {
    # of every config of transformers: where it comes from, how it is generated with
    *("_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention"),
    *("architectures", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id"),
    *("chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id"),
    *("diversity_penalty", "do_sample", "dtype", "early_stopping", "eos_token_id"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range"),
    *("is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length"),
    *("min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_attentions", "output_hidden_states", "output_scores"),
    *("pad_token_id", "prefix", "problem_type", "pruned_heads", "remove_invalid_values"),
    *("repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id"),
    *("suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript"),
    *("transformers_version", "typical_p", "use_bfloat16", "use_cache"),
    # of MPT: how it was built and begun, which its weights need no more
    *("attn_impl", "flash_attn_impl", "init_config", "init_device", "loss_fn", "name"),
    *("tokenizer_name", "use_pad_tok_in_ffn", "verbose"),
    # of Llama: how its matrices were cut when it was trained
    "pretraining_tp",
}

_OFF: Values = {
    "attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0},
    "fc_type": "torch",
    "fuse_norm_attn_norm": False,
    "fused_qkv": True,
    "nope": False,
    "prefix_lm": False,
}
"""Options of MPT elsewhere that are not here: the value of each at which it does nothing."""

_WHY_NOT = {"fused_qkv": "keeps queries, keys and values apart, which is not read here."}

_FROM_LLAMA = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "kv_n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "attention_dropout": "attn_pdrop",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
}

_LLAMA_EPS = 1e-6
"""What transformers takes where a config says nothing."""


def model_from_config(config: Mapping[str, Any]) -> tuple[Architecture, Model]:
    """Return what a config.json describes; it may come from a stranger.

    An option counts with the value that is written, also where transformers' MPT would ignore
    it: that is what the weights were trained with. How weights begin (`init_config`) is left out.

    Raises:
        CheckpointError: if it is neither MPT's nor Llama's, or has an option that is not built
            here; names all.
    """
    kind = config.get("model_type")
    match kind:
        case "mpt":
            values, problems = _mpt(config)
        case "llama":
            values, problems = _llama(config)
        case _:
            raise CheckpointError(
                f"config.json: model_type is {kind!r}; mpt and llama are what is read here."
            )
    try:
        model = model_from(values)
    except RecipeError as error:
        problems += [_in_their_words(line, kind) for line in str(error).splitlines()]
    if problems:
        raise CheckpointError("config.json: " + "\n  ".join(problems))
    return ("mpt" if kind == "mpt" else "llama"), model


def _in_their_words(line: str, kind: str) -> str:
    """Return a complaint about a key of ours with the name it has in their config."""
    key, _, what = line.removeprefix("model: model.").partition(":")
    if kind == "llama":
        key = {ours: theirs for theirs, ours in _FROM_LLAMA.items()}.get(key, key)
    return f"{key}:{what}"


def _mpt(config: Mapping[str, Any]) -> tuple[Values, list[str]]:
    problems: list[str] = []
    values = dict(_flat(config, problems))
    # llm-foundry's own class has other defaults than transformers' port of it.
    is_original = "auto_map" in config or "MPTForCausalLM" in str(config.get("architectures"))
    values.setdefault("alibi", not is_original)
    values.setdefault("no_bias", not is_original)
    values.setdefault("learned_pos_emb", True)
    if values["alibi"] is True or values.get("rope") is True:
        values["learned_pos_emb"] = False  # as in llm-foundry: the other one wins
    if "layer_norm_epsilon" in values:
        values["norm_eps"] = values.pop("layer_norm_epsilon")
    if values.get("ffn_type") == "mptgeglu":
        values["ffn_type"] = "mptglu"
    problems += _activation(values)
    problems += _rope_of_mpt(values)
    if isinstance(values.get("block_overrides"), dict):
        values["block_overrides"] = _overrides(values["block_overrides"])
    for key, off in _OFF.items():
        if key in values and values[key] == off:
            del values[key]
        elif key in values and key in _WHY_NOT:
            problems.append(f"{key}: {values.pop(key)!r} {_WHY_NOT[key]}")
    known = Model.__dataclass_fields__
    values = {k: v for k, v in values.items() if v is not None or k in known}
    return _plainest(values), problems


def _flat(config: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the options of the whole config, wherever MPT's versions have nested them."""
    found: Values = {}
    sections: dict[str, Any] = {"": config}
    sections |= {key: config[key] for key in ("attn_config", "ffn_config") if key in config}
    for section, content in sections.items():
        if section and not isinstance(content, dict):
            problems.append(f"{section}: {content!r} is not a mapping.")
            continue
        # A nested section of transformers carries defaults of its own, this one among them.
        inert = _INERT | ({"tie_word_embeddings"} if section else sections.keys())
        for key in content.keys() - inert:
            if key in found and found[key] != content[key]:
                problems.append(f"{key}: is {found[key]!r}, and {content[key]!r} in {section}.")
            found.setdefault(key, content[key])
    yield from sorted(found.items())


def _activation(values: Values) -> Iterator[str]:
    """Turn a function of torch with its arguments into its name here."""
    given = values.pop("ffn_act_fn", None)
    if given is None:
        return
    names = {"gelu": {"none": "gelu", "tanh": "gelu_tanh"}}
    form = dict(given) if isinstance(given, dict) else {"name": given}
    name, how = form.pop("name", None), form.pop("approximate", "none")
    if form or not isinstance(name, str) or how not in ("none", "tanh"):
        yield f"ffn_act_fn: {given!r} is not an activation that is built."
    else:
        values["act_fn"] = names.get(name, {}).get(how, name)


def _rope_of_mpt(values: Values) -> Iterator[str]:
    """Leave of RoPE's options what has an effect."""
    kind, dail = values.pop("rope_impl", "hf"), values.pop("rope_dail_config", None)
    if not values.get("rope"):
        values.pop("rope_hf_config", None)
    elif kind == "dail":
        values.pop("rope_hf_config", None)
        if isinstance(dail, dict) and dail.get("type", "original") != "original":
            yield f"rope_dail_config: type {dail['type']!r} is not built; original is."
    elif kind != "hf":
        yield f"rope_impl: {kind!r} is not one of hf, dail."


def _overrides(given: Values) -> Values:
    """Return block_overrides with each kind's attn_config unfolded."""
    kinds = given.get("overrides")
    if not isinstance(kinds, dict):
        return given
    flat = {
        name: {k: v for k, v in kind.items() if k != "attn_config"} | kind["attn_config"]
        if isinstance(kind, dict) and isinstance(kind.get("attn_config"), dict)
        else kind
        for name, kind in kinds.items()
    }
    return given | {"overrides": flat}


def _llama(config: Mapping[str, Any]) -> tuple[Values, list[str]]:
    problems: list[str] = []
    given = {key: value for key, value in config.items() if key not in _INERT}
    biases = [given.pop(key, False) for key in ("attention_bias", "mlp_bias")]
    if not all(type(bias) is bool for bias in biases) or biases[0] != biases[1]:
        problems.append(
            f"attention_bias: is {biases[0]!r}, and mlp_bias {biases[1]!r}; "
            "only both or none are built."
        )
    act = given.pop("hidden_act", "silu")
    names = {theirs: ours for ours, theirs in LLAMA_ACTIVATIONS.items()} | {"swish": "silu"}
    if not isinstance(act, str) or act not in names:
        problems.append(f"hidden_act: {act!r} is not one of {', '.join(names)}.")
        act = "silu"
    rope = _rope_of_llama(given, problems)
    unknown = [k for k in given.keys() - _FROM_LLAMA.keys() if given[k] is not None]
    problems += [f"{key}: is not an option of Llama that is known here." for key in sorted(unknown)]
    values = {ours: given[theirs] for theirs, ours in _FROM_LLAMA.items() if theirs in given}
    fixed = {
        "alibi": False,
        "rope": True,
        "ffn_type": "mptglu",
        "norm_type": "rmsnorm",
        "no_bias": biases[0] is not True,
        "act_fn": names[act],
    }
    values = {"norm_eps": _LLAMA_EPS, "tie_word_embeddings": False} | values | rope | fixed
    if values.get("attn_pdrop", 0.0) is None:
        values["attn_pdrop"] = 0.0
    return _plainest(values), problems


def _rope_of_llama(given: Values, problems: list[str]) -> Values:
    """Take RoPE's options, which have moved between versions of transformers, out of `given`."""
    form = given.pop("rope_parameters", None) or given.pop("rope_scaling", None) or {}
    given.pop("rope_scaling", None)
    if not isinstance(form, dict):
        problems.append(f"rope_parameters: {form!r} is not a mapping.")
        return {}
    form = dict(form)
    theta = form.pop("rope_theta", given.pop("rope_theta", None))
    kind = form.pop("rope_type", form.pop("type", "default"))
    form.pop("type", None)
    if form.pop("partial_rotary_factor", None) not in (None, 1.0):
        problems.append("partial_rotary_factor: heads are rotated as a whole here.")
    values: Values = {} if theta is None else {"rope_theta": theta}
    if kind == "default":
        return values
    if kind == "llama3":
        form.setdefault("original_max_position_embeddings", given.get("max_position_embeddings"))
    return values | {"rope_hf_config": {"type": kind, **form}}


def _plainest(values: Values) -> Values:
    """Leave out what says only what follows from the rest, so that equal models look equal."""
    width, heads = values.get("d_model"), values.get("n_heads")
    match values.get("attn_type"), values.get("kv_n_heads"):
        case "multiquery_attention", None:
            values["kv_n_heads"] = 1
            del values["attn_type"]
        case ("multihead_attention", None) | ("grouped_query_attention", int()):
            del values["attn_type"]
    if values.get("kv_n_heads") == heads:
        values.pop("kv_n_heads", None)
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        whole, rest = divmod(width, heads)
        if not rest and values.get("head_dim") == whole:
            del values["head_dim"]
    return values
