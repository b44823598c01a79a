"""Which options a plan points out, because MPT was not released with them."""

from __future__ import annotations

from dataclasses import replace

import yaml
from hypothesis import given, settings

from mpt import recipe
from mpt.recipe.budget import n_parameters, plan
from mpt.recipe.init import Init
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from mpt.recipe.plain import model_from
from mpt.recipe.unusual import unusual
from tests.recipe.test_recipe_budget import TINY, models, mpt


def test_only_options_that_differ_from_the_released_profile_are_unusual() -> None:
    assert unusual(mpt("7b")) == []
    spelled_out = replace(
        mpt("7b"),
        attn_type="multihead_attention",
        kv_n_heads=32,
        head_dim=128,
        ffn_hidden_size=4 * 4096,
    )
    assert unusual(spelled_out) == []
    assert plan(recipe.load(TINY, ["model.qk_ln=true"]), world_size=1).unusual == ["qk_ln: true"]


def test_each_unusual_option_is_told_as_a_recipe_would_say_it() -> None:
    kinds = {"near": Override(sliding_window_size=64)}
    order = (Order(name="default"), Order(name="near", repeat=11))
    model = replace(
        mpt("125m"),
        kv_n_heads=3,
        clip_qkv=6.0,
        alibi=False,
        rope=True,
        init_config=Init(name="small_init_", emb_init_uniform_lim=(-0.1, 0.1)),
        block_overrides=BlockOverrides(order=order, overrides=kinds),
    )
    assert unusual(model) == [
        "kv_n_heads: 3",
        "clip_qkv: 6.0",
        "alibi: false",
        "rope: true",
        "block_overrides: {order: [{name: default, repeat: 1}, {name: near, repeat: 11}], "
        "overrides: {near: {sliding_window_size: 64}}}",
        "init_config.name: small_init_",
        "init_config.emb_init_uniform_lim: [-0.1, 0.1]",
    ]


@given(model=models())
@settings(max_examples=50, deadline=None)
def test_what_is_unusual_tells_models_of_one_size_apart(model: Model) -> None:
    text = "\n".join(line for line in unusual(model) if "." not in line.partition(":")[0])
    sizes = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")
    again = model_from({key: getattr(model, key) for key in sizes} | (yaml.safe_load(text) or {}))
    assert unusual(again) == unusual(model)
    assert n_parameters(again) == n_parameters(model)
