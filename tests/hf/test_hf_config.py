"""Laws of config.json on the way out: an option is computed by transformers, or refused by name."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.errors import UsageError
from mpt.hf.config import LLAMA_ACTIVATIONS, TRAINING_ONLY, config_json, expressible, unsupported
from mpt.hf.export import export
from mpt.hf.understand import model_from_config
from mpt.model.network import ACTIVATIONS
from mpt.recipe.init import Init
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from mpt.recipe.rope import RopeScaling

from .conftest import MakeWeights

transformers = pytest.importorskip("transformers")

WINDOWED = BlockOverrides(
    order=(Order(name="near"), Order(name="default")),
    overrides={"near": Override(sliding_window_size=4)},
)
SHARED = BlockOverrides(
    order=(Order(name="default"), Order(name="borrows")),
    overrides={"borrows": Override(reuse_kv_layer_idx=-1)},
)
ALL_WINDOWED = replace(WINDOWED, order=(Order(name="near", repeat=2),))

CARRIED_BY_MPT: dict[str, dict[str, Any]] = {
    "d_model": {"d_model": 96},
    "n_heads": {"n_heads": 4},
    "n_layers": {"n_layers": 1},
    "max_seq_len": {"max_seq_len": 50},
    "vocab_size": {"vocab_size": 64},
    "attn_type": {"attn_type": "multihead_attention"},
    "clip_qkv": {"clip_qkv": 0.5},
    "softmax_scale": {"softmax_scale": 0.9},
    "norm_eps": {"norm_eps": 0.2},
    "tie_word_embeddings": {"tie_word_embeddings": False},
    "rope_theta": {"rope_theta": 7.0},  # means nothing without rope
    "attn_pdrop": {"attn_pdrop": 0.5},
    "emb_pdrop": {"emb_pdrop": 0.5},
    "resid_pdrop": {"resid_pdrop": 0.5},
    "embedding_fraction": {"embedding_fraction": 0.1},
    "attn_uses_sequence_id": {"attn_uses_sequence_id": True},
    "init_config": {"init_config": Init(name="neox_init_")},
}
REFUSED_BY_MPT: dict[str, dict[str, Any]] = {
    "kv_n_heads": {"kv_n_heads": 2},
    "head_dim": {"head_dim": 10},
    "qk_ln": {"qk_ln": True},
    "qk_gn": {"qk_gn": True},
    "attn_logit_softcapping": {"attn_logit_softcapping": 20.0},
    "sliding_window_size": {"sliding_window_size": 9},
    "attention_bias": {"attention_bias": True},
    "alibi": {"alibi": False},
    "alibi_bias_max": {"alibi_bias_max": 16},
    "rope": {"alibi": False, "rope": True},
    "learned_pos_emb": {"alibi": False, "learned_pos_emb": True},
    "ffn_type": {"ffn_type": "mptglu"},
    "expansion_ratio": {"expansion_ratio": 2.0},
    "ffn_hidden_size": {"ffn_hidden_size": 100},
    "act_fn": {"act_fn": "relu"},
    "norm_type": {"norm_type": "rmsnorm"},
    "no_bias": {"no_bias": False},
    "logit_scale": {"logit_scale": "inv_sqrt_d_model"},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "block_overrides": {"block_overrides": SHARED},
    # with rope, of which it is a part
    "rope_hf_config": {"alibi": False, "rope": True},
}

LLAMA = Model(
    d_model=48,
    n_heads=6,
    n_layers=2,
    max_seq_len=96,
    vocab_size=1100,
    kv_n_heads=2,
    alibi=False,
    rope=True,
    ffn_type="mptglu",
    act_fn="silu",
    norm_type="rmsnorm",
    ffn_hidden_size=80,
    tie_word_embeddings=False,
)
REFUSED_BY_LLAMA: dict[str, dict[str, Any]] = {
    "alibi": {"alibi": True, "rope": False},
    "rope": {"rope": False},
    "clip_qkv": {"clip_qkv": 1.0},
    "softmax_scale": {"softmax_scale": 0.3},
    "qk_ln": {"qk_ln": True},
    "learned_pos_emb": {"rope": False, "learned_pos_emb": True},
    "ffn_type": {"ffn_type": "mptmlp"},
    "act_fn": {"act_fn": "elu"},
    "norm_type": {"norm_type": "layernorm"},
    "attention_bias": {"attention_bias": True},
    "n_heads": {"n_heads": 5, "kv_n_heads": 5, "head_dim": 8},
    "sliding_window_size": {"sliding_window_size": 9},
    "block_overrides": {"block_overrides": ALL_WINDOWED},
}

IGNORED_BY_TRANSFORMERS: dict[str, Any] = {
    "expansion_ratio": 2,
    "learned_pos_emb": True,
    "logit_scale": 0.5,
    "no_bias": False,
    "norm_type": "rmsnorm",
}
IGNORED_IN_ATTENTION: dict[str, Any] = {
    "alibi": False,
    "alibi_bias_max": 16,
    "attn_type": "multiquery_attention",
    "qk_ln": True,
}


def config_of(model: Model) -> dict[str, Any]:
    return config_json(model, dtype="float32", eod_id=0)


def logits_in_transformers(config: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    network = transformers.MptForCausalLM(transformers.MptConfig(**config)).eval()
    with torch.inference_mode():
        logits: torch.Tensor = network(torch.arange(40)[None]).logits
    return logits


def test_every_option_of_a_model_is_looked_at_here() -> None:
    assert CARRIED_BY_MPT.keys() | REFUSED_BY_MPT.keys() == {field.name for field in fields(Model)}
    assert set(TRAINING_ONLY) < CARRIED_BY_MPT.keys()
    assert LLAMA_ACTIVATIONS.keys() == ACTIVATIONS.keys() - {"elu"}


@pytest.mark.parametrize("key", CARRIED_BY_MPT)
def test_an_option_that_is_carried_is_computed_by_transformers(
    make_weights: MakeWeights, model: Model, tmp_path: Path, key: str
) -> None:
    changed = replace(model, **CARRIED_BY_MPT[key])
    assert expressible(changed) == ("mpt", ())
    assert export(make_weights(changed), changed, None, tmp_path / "out").proved


@pytest.mark.parametrize("key", REFUSED_BY_MPT)
def test_an_option_that_mpt_there_does_not_compute_is_refused_by_name(
    model: Model, key: str
) -> None:
    changed = replace(model, **REFUSED_BY_MPT[key])
    named = {reason.split(": ")[1] for reason in unsupported(changed) if "as MPT" in reason}
    assert named & {f"model.{key}", f"model.{key.replace('_hf_config', '')}"}
    assert not named - {f"model.{name}" for name in REFUSED_BY_MPT[key]}  # and nothing else
    with pytest.raises(UsageError, match=f"as MPT: model.{key.replace('_hf_config', '')}: "):
        config_of(changed)


@pytest.mark.parametrize("key", REFUSED_BY_LLAMA)
def test_an_option_that_llama_does_not_compute_is_refused_by_name(key: str) -> None:
    assert expressible(LLAMA) == ("llama", ())
    changed = replace(LLAMA, **REFUSED_BY_LLAMA[key])
    named = {reason.split(": ")[1] for reason in unsupported(changed) if "as Llama" in reason}
    assert f"model.{key}" in named
    assert not named - {f"model.{name}" for name in REFUSED_BY_LLAMA[key]}


def test_overrides_that_change_nothing_are_in_no_ones_way(model: Model) -> None:
    nothing = BlockOverrides(order=(Order(name="default", repeat=2),))
    assert unsupported(replace(model, block_overrides=nothing)) == []
    for overrides in (SHARED, WINDOWED, ALL_WINDOWED):
        reasons = unsupported(replace(model, block_overrides=overrides))
        assert reasons[0].startswith("as MPT: model.block_overrides: ")


def test_all_offending_options_are_named_at_once_for_both(model: Model) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(replace(model, expansion_ratio=2, alibi_bias_max=16))
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip().rsplit(": ", 1)[0] for line in lines] == [
        "as MPT: model.alibi_bias_max",
        "as MPT: model.expansion_ratio",
        "as Llama: model.alibi",
        "as Llama: model.rope",
        "as Llama: model.clip_qkv",
        "as Llama: model.softmax_scale",
        "as Llama: model.ffn_type",
        "as Llama: model.norm_type",
    ]


@pytest.mark.parametrize("key", IGNORED_BY_TRANSFORMERS | IGNORED_IN_ATTENTION)
def test_transformers_really_ignores_what_is_refused(model: Model, key: str) -> None:
    config = config_of(model)
    expected = logits_in_transformers(config)
    place = config["attn_config"] if key in IGNORED_IN_ATTENTION else config
    place[key] = (IGNORED_BY_TRANSFORMERS | IGNORED_IN_ATTENTION)[key]
    assert torch.equal(logits_in_transformers(config), expected)


@pytest.mark.parametrize(
    ("key", "value"), [("clip_qkv", 0.01), ("softmax_scale", 3.0), ("norm_eps", 0.5)]
)
def test_transformers_obeys_what_is_written(model: Model, key: str, value: float) -> None:
    expected = logits_in_transformers(config_of(model))
    changed: dict[str, Any] = {key: value}
    other = logits_in_transformers(config_of(replace(model, **changed)))
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"softmax_scale": None, "clip_qkv": None, "norm_type": "layernorm", "norm_eps": 1e-6},
        {"tie_word_embeddings": False, "embedding_fraction": 0.5},
    ],
)
def test_a_config_of_mpt_comes_back_as_the_model_it_was(
    model: Model, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = replace(model, attn_pdrop=0.0, **change)
    assert model_from_config(config_of(model)) == ("mpt", model)
    # Also after transformers has had it in hands.
    transformers.MptConfig(**config_of(model)).save_pretrained(tmp_path)
    saved = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    assert model_from_config(saved) == ("mpt", model)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_n_heads": None, "no_bias": False, "attn_pdrop": 0.25, "tie_word_embeddings": True},
        {"head_dim": 10, "rope_theta": 300.0, "norm_eps": 1e-6},
        {"rope_hf_config": RopeScaling(type="linear", factor=3.0)},
        {"rope_hf_config": RopeScaling(type="dynamic", factor=3.0)},
        {
            "rope_hf_config": RopeScaling(
                type="llama3",
                factor=8.0,
                low_freq_factor=2.0,
                high_freq_factor=3.0,
                original_max_position_embeddings=24,
            )
        },
        *({"act_fn": name} for name in LLAMA_ACTIVATIONS),
    ],
)
def test_a_config_of_llama_comes_back_as_the_model_it_was(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    model = replace(LLAMA, **change)
    assert model_from_config(config_of(model)) == ("llama", model)
    transformers.LlamaConfig(**config_of(model)).save_pretrained(tmp_path)
    saved = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    assert model_from_config(saved) == ("llama", model)
