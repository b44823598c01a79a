"""Laws of a config.json from elsewhere: each key is mapped, without effect, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from mpt.errors import CheckpointError
from mpt.hf.understand import model_from_config
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from mpt.recipe.rope import RopeScaling

SIZES: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 128,
    "vocab_size": 512,
}

RELEASED: dict[str, Any] = {  # as MPT-7B's was, at another size
    **SIZES,
    "architectures": ["MPTForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "triton",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "init_std": 0.02, "init_gain": 0, "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,  # which alibi overrides
    "logit_scale": None,
    "model_type": "mpt",
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
}
NATIVE = {"model_type": "mpt", **SIZES, "learned_pos_emb": False}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
EXPECTED_LLAMA = Model(
    **{**SIZES, "kv_n_heads": 2},
    ffn_hidden_size=160,
    ffn_type="mptglu",
    act_fn="silu",
    norm_type="rmsnorm",
    norm_eps=1e-5,
    alibi=False,
    rope=True,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)


def changed(config: dict[str, Any], attention: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {**config, **top, "attn_config": {**config.get("attn_config", {}), **attention}}


def test_the_released_models_config_is_understood() -> None:
    assert model_from_config(RELEASED) == ("mpt", Model(**SIZES))


def test_options_that_transformers_ignores_count_as_they_are_written() -> None:
    config = changed(NATIVE, {"alibi_bias_max": 16, "qk_ln": True}, logit_scale=0.5)
    wanted = Model(**SIZES, alibi_bias_max=16, qk_ln=True, logit_scale=0.5)
    assert model_from_config(config) == ("mpt", wanted)


def test_what_is_not_written_is_the_default_of_who_wrote_the_rest() -> None:
    native = {"model_type": "mpt", **SIZES}
    assert model_from_config(native) == ("mpt", Model(**SIZES))
    original = {**native, "architectures": ["MPTForCausalLM"]}
    wanted = Model(**SIZES, alibi=False, learned_pos_emb=True, no_bias=False)
    assert model_from_config(original) == ("mpt", wanted)


@pytest.mark.parametrize(
    ("attention", "top", "wanted"),
    [
        ({"kv_n_heads": 2, "attn_type": "grouped_query_attention"}, {}, {"kv_n_heads": 2}),
        ({"attn_type": "multiquery_attention"}, {}, {"kv_n_heads": 1}),
        ({"qk_gn": True, "sliding_window_size": 7}, {}, {"qk_gn": True, "sliding_window_size": 7}),
        ({"attn_logit_softcapping": 5}, {}, {"attn_logit_softcapping": 5.0}),
        (
            {},
            {"no_bias": False, "norm_type": "rmsnorm"},
            {"no_bias": False, "norm_type": "rmsnorm"},
        ),
        ({}, {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),
        ({"fused_qkv": True, "kv_dim": None, "nope": False}, {"fc_type": "torch"}, {}),
        ({"attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0}}, {}, {}),
        ({}, {"layer_norm_epsilon": 1e-6}, {"norm_eps": 1e-6}),
        ({}, {"residual_modification": None, "use_pad_tok_in_ffn": True}, {}),
        # A nested section's own default does not count.
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"tie_word_embeddings": 0}),
        ({"rope_hf_config": {"type": "linear", "factor": 2.0}}, {}, {}),  # no rope to scale
    ],
)
def test_options_of_llm_foundry_are_mapped(
    attention: dict[str, Any], top: dict[str, Any], wanted: dict[str, Any]
) -> None:
    _, model = model_from_config(changed(RELEASED, attention, **top))
    assert model == Model(**{**SIZES, **wanted})


@pytest.mark.parametrize(
    ("how", "scaling"),
    [
        ({"rope_impl": "hf", "rope_hf_config": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_hf_config": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_impl": "dail", "rope_hf_config": {"type": "linear", "factor": 2.0}}, None),
        ({"rope_impl": "dail", "rope_dail_config": {"type": "original"}}, None),
    ],
)
def test_rope_is_scaled_as_its_implementation_did(how: dict[str, Any], scaling: Any) -> None:
    rope = {"alibi": False, "rope": True, "rope_theta": 5000, **how}
    _, model = model_from_config(changed(RELEASED, rope))
    assert model.rope
    assert not model.learned_pos_emb  # rope overrides it
    assert model.rope_theta == 5000.0
    wanted = RopeScaling() if scaling is None else RopeScaling(type=scaling, factor=2.0)
    assert model.rope_hf_config == wanted


@pytest.mark.parametrize(
    ("ffn", "ffn_type", "act_fn"),
    [
        ({"ffn_type": "mptmlp"}, "mptmlp", "gelu"),
        ({"ffn_type": "mptgeglu", "ffn_act_fn": {"name": "silu"}}, "mptglu", "silu"),
        ({"ffn_type": "mptglu", "ffn_act_fn": {"name": "gelu"}}, "mptglu", "gelu"),
        ({"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}, "mptmlp", "gelu_tanh"),
        ({"ffn_act_fn": None, "ffn_hidden_size": 96}, "mptmlp", "gelu"),
    ],
)
def test_a_feed_forwards_section_is_unfolded(
    ffn: dict[str, Any], ffn_type: str, act_fn: str
) -> None:
    _, model = model_from_config({**RELEASED, "ffn_config": ffn})
    assert (model.ffn_type, model.act_fn) == (ffn_type, act_fn)
    assert model.ffn_hidden_size == ffn.get("ffn_hidden_size")


def test_block_overrides_are_unfolded() -> None:
    overrides = {
        "order": [{"name": "default"}, {"name": "near"}],
        "overrides": {"near": {"attn_config": {"sliding_window_size": 16}}},
    }
    _, model = model_from_config({**RELEASED, "block_overrides": overrides})
    assert model.block_overrides == BlockOverrides(
        order=(Order(name="default"), Order(name="near")),
        overrides={"near": Override(sliding_window_size=16)},
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": 1}, "surprise: unknown key"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; mpt and llama are"),
        ({"model_type": ["mpt"]}, "mpt and llama are"),
        ({"d_model": "48"}, "d_model: .* is not a whole number"),
        ({"n_layers": True}, "n_layers: .* is not a whole number"),
        ({"n_heads": 5}, "n_heads: 5 heads do not divide"),
        ({"n_layers": -1}, "n_layers: -1 is too small"),
        ({"resid_pdrop": None}, "resid_pdrop: has no value"),
        ({"emb_pdrop": float("nan")}, "emb_pdrop: .nan is not a number"),
        ({"attn_pdrop": 0.5}, "attn_pdrop: is 0.5, and 0 in attn_config"),
        ({"attn_config": 3}, "attn_config: 3 is not a mapping"),
        ({"attn_config": {"prefix_lm": True}}, "prefix_lm: .*causal"),
        ({"attn_config": {"fused_qkv": False}}, "fused_qkv: False keeps"),
        ({"attn_config": {"alibi": False, "rope": True, "rope_impl": "own"}}, "rope_impl: 'own'"),
        (
            {"attn_config": {"rope": True, "rope_impl": "dail", "rope_dail_config": {"type": "x"}}},
            "rope_dail_config: type 'x' is not built",
        ),
        ({"attn_config": {"kv_dim": 12}}, "kv_dim: .*no cross-attention"),
        ({"attn_config": {"attn_temperature_tuning": {"attn_scale": 0.1}}}, "attn_temperature"),
        ({"ffn_config": {"ffn_type": "mb_dmoe"}}, "ffn_type: .*mixtures of experts"),
        ({"ffn_config": {"ffn_act_fn": {"name": "quick_gelu"}}}, "act_fn: 'quick_gelu' is not one"),
        ({"ffn_config": {"ffn_act_fn": {"name": ["gelu"]}}}, "ffn_act_fn: .* is not an activation"),
        ({"norm_type": "te_rmsnorm"}, "norm_type: .*Transformer Engine"),
        ({"block_overrides": {"order": []}}, "block_overrides.order: spells out 0 blocks"),
        ({"block_overrides": {"order": [{"name": "x"}, {}], "overrides": 3}}, "overrides: "),
        ({"no_bias": 1}, "no_bias: "),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        model_from_config({**RELEASED, **change})


def test_all_that_is_wrong_is_said_at_once() -> None:
    config = changed(RELEASED, {"fused_qkv": False, "prefix_lm": True}, n_heads=0, surprise=1)
    with pytest.raises(CheckpointError) as caught:
        model_from_config(config)
    for key in ("fused_qkv: ", "prefix_lm: ", "surprise: "):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"head_dim": 16, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0},
        {"hidden_act": "swish", "attention_dropout": None, "sliding_window": None},
    ],
)
def test_configs_of_llama_through_the_years_mean_the_same(change: dict[str, Any]) -> None:
    assert model_from_config({**LLAMA, **change}) == ("llama", EXPECTED_LLAMA)


def test_what_a_config_of_llama_leaves_out_is_what_transformers_takes() -> None:
    sparse = {key: LLAMA[key] for key in LLAMA if not key.startswith(("rms", "rope", "tie", "hid"))}
    _, model = model_from_config({**sparse, "hidden_size": 64})
    default = pytest.importorskip("transformers").LlamaConfig()
    assert model.norm_eps == default.rms_norm_eps
    assert model.tie_word_embeddings == default.tie_word_embeddings
    assert model.act_fn == default.hidden_act
    assert model.rope_theta == default.rope_parameters["rope_theta"]


def test_an_old_llama3_scaling_is_understood() -> None:
    scaling = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    _, model = model_from_config({**LLAMA, "rope_scaling": scaling})
    assert model.rope_hf_config == RopeScaling(
        type="llama3", factor=8.0, original_max_position_embeddings=128
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, "attention_bias: is True, and mlp_bias False"),
        ({"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu' is not one"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_hf_config.type: .*'yarn' is not"),
        ({"rope_scaling": 3}, "rope_parameters: 3 is not a mapping"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"qk_ln": True}, "qk_ln: is not an option of Llama"),
        ({"num_experts": 8, "kv_n_heads": 1}, "kv_n_heads: is not .*\n.*num_experts: is not"),
        ({"hidden_size": None}, "hidden_size: has no value"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 is too small"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads: 5 heads do not"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 heads of keys do not divide 4"),
    ],
)
def test_a_config_that_is_not_llamas_is_refused_by_its_own_key(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        model_from_config({**LLAMA, **change})
