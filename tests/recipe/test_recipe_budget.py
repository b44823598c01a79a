"""The arithmetic of a recipe: parameters, FLOPs, memory and disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mpt import recipe
from mpt.model.network import MPT
from mpt.optim import build_optimizer, training_tensors
from mpt.recipe.budget import (
    activation_bytes,
    causal_flops_per_token,
    flops_per_token,
    n_parameters,
    plan,
    saved_bytes,
    state_bytes_per_rank,
)
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from mpt.recipe.train import Optimizer, OptimizerName

TINY = Path(__file__).parents[1] / "golden" / "recipe.yaml"
GIB = 1 << 30

# The released MPT-7B and MPT-30B count 6,649,286,656 and 29,957,200,896 parameters.
SIZES = {
    "125m": (768, 12, 12, 123_685_632),
    "350m": (1024, 16, 24, 353_682_432),
    "760m": (1536, 12, 24, 757_016_064),
    "1b": (2048, 16, 24, 1_311_344_640),
    "3b": (2560, 20, 32, 2_645_854_720),
    "7b": (4096, 32, 32, 6_649_286_656),
    "13b": (5120, 40, 40, 12_841_538_560),
    "30b": (7168, 64, 48, 29_957_200_896),
    "70b": (8192, 64, 80, 64_838_967_296),
}


def mpt(size: str) -> Model:
    d_model, n_heads, n_layers, _ = SIZES[size]
    return Model(
        d_model=d_model, n_heads=n_heads, n_layers=n_layers, max_seq_len=2048, vocab_size=50_432
    )


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_mpt(size: str) -> None:
    assert n_parameters(mpt(size)) == SIZES[size][3]


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Return any small model: every option that brings, takes or shares parameters."""
    n_heads = draw(st.sampled_from([1, 2, 4]))
    names = draw(st.lists(st.sampled_from(["default", "near", "shares", "both"]), max_size=3))
    kinds = {
        "near": Override(sliding_window_size=5),
        "shares": Override(reuse_kv_layer_idx=-1),
        "both": Override(sliding_window_size=3, reuse_kv_layer_idx=-1),
    }
    order = tuple(Order(name=name) for name in ["default", *names])
    qk: dict[str, Any] = draw(st.sampled_from([{}, {"qk_ln": True}, {"qk_gn": True}]))
    options: dict[str, Any] = {
        "kv_n_heads": draw(st.sampled_from([None, 1, n_heads])),
        "head_dim": draw(st.sampled_from([None, 2, 6])),
        "ffn_hidden_size": draw(st.sampled_from([None, 7])),
        "ffn_type": draw(st.sampled_from(["mptmlp", "mptglu"])),
        "expansion_ratio": draw(st.sampled_from([4.0, 2.5, 0.3])),
        "norm_type": draw(st.sampled_from(["low_precision_layernorm", "layernorm", "rmsnorm"])),
    } | {key: draw(st.booleans()) for key in ("no_bias", "attention_bias", "tie_word_embeddings")}
    return Model(
        d_model=16,
        n_heads=n_heads,
        n_layers=len(order),
        max_seq_len=24,
        vocab_size=11,
        alibi=False,
        learned_pos_emb=draw(st.booleans()),
        block_overrides=draw(st.sampled_from([None, BlockOverrides(order=order, overrides=kinds)])),
        **options,
        **qk,
    )


@given(model=models())
@settings(max_examples=150, deadline=None)
def test_parameters_are_those_that_the_network_has(model: Model) -> None:
    assert list(model.problems()) == []
    with torch.device("meta"):
        network = MPT(model)
    assert n_parameters(model) == sum(p.numel() for p in network.parameters())


@given(model=models(), name=st.sampled_from(["adamw", "muon"]))
@settings(max_examples=60, deadline=None)
def test_a_checkpoint_has_what_the_optimizer_keeps(model: Model, name: OptimizerName) -> None:
    network = MPT(model)
    optimizer = build_optimizer(network, Optimizer(name=name, lr=1e-3))
    saved = training_tensors(network, optimizer)
    held = sum(t.nbytes for key, t in saved.items() if ".step." not in key)  # a word a tensor
    assert saved_bytes(model, name) == held


def test_a_run_whose_samples_are_cut_at_first_computes_less() -> None:
    overrides = [
        "train.steps=10",
        "schedule.warmup_steps=0",
        "train.seq_warmup={start: 64, steps: 4}",
    ]
    cut = recipe.load(TINY, overrides)
    assert cut.model.max_seq_len == 256
    per_step = cut.train.global_batch_size * 256
    wanted = sum(
        n * per_step * flops_per_token(replace(cut.model, max_seq_len=length))
        for n, length in ((2, 64), (2, 128), (6, 256))
    )
    found = plan(cut, world_size=1)
    assert found.total_flops == wanted
    assert found.total_tokens == 10 * per_step


@given(model=models())
@settings(max_examples=40, deadline=None)
def test_flops_are_those_of_the_products_that_a_step_computes(model: Model) -> None:
    # torch's own count, of attention in full: windows are another test's
    model = replace(model, block_overrides=None)
    network = MPT(model, "blocks")
    tokens = torch.zeros(1, model.max_seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(tokens)
    vectors = sum(p.numel() for p in network.parameters() if p.ndim == 1)
    # The backward pass computes twice what the forward pass does; vectors make no product, but
    # the usual 6 N counts them.
    of_products = 3 * counter.get_total_flops() / model.max_seq_len
    assert flops_per_token(model) == of_products + 6 * vectors


def test_a_block_that_borrows_keys_and_values_multiplies_by_none_of_its_own() -> None:
    order = (Order(name="default"), Order(name="shares", repeat=11))
    kinds = {"shares": Override(reuse_kv_layer_idx=-1)}
    lending = replace(mpt("125m"), block_overrides=BlockOverrides(order=order, overrides=kinds))
    own = mpt("125m")
    assert n_parameters(own) - n_parameters(lending) == 11 * 2 * 768 * 768
    assert flops_per_token(own) - flops_per_token(lending) == 6 * 11 * 2 * 768 * 768
    assert activation_bytes(own, 1, "bf16") - activation_bytes(lending, 1, "bf16") == (
        11 * 2 * 768 * 2048 * 2
    )


@pytest.mark.parametrize("window", [1, 7, 60, 63, 64, 1000])
def test_a_window_costs_the_pairs_that_it_leaves_to_see(window: int) -> None:
    model = Model(d_model=32, n_heads=2, n_layers=3, max_seq_len=64, vocab_size=11)
    near = replace(model, sliding_window_size=window)
    per_pair = 12 * 3 * 32 / 64  # of a token's share in one of all pairs, in three blocks
    products = 6 * n_parameters(model)
    assert flops_per_token(near) == products + per_pair * 64 * min(64, window + 1)
    pairs = sum(min(token + 1, window + 1) for token in range(64))
    # Tokens see themselves, which the half of all pairs counts as half.
    pairs -= min(64, window + 1) / 2  # type: ignore[assignment]
    assert causal_flops_per_token(near) == pytest.approx(products + per_pair * pairs, rel=1e-12)


def test_flops_are_six_a_parameter_and_twelve_a_layer_width_and_position() -> None:
    model = mpt("7b")
    assert flops_per_token(model) == 6 * 6_649_286_656 + 12 * 32 * 4096 * 2048
    assert causal_flops_per_token(model) == 6 * 6_649_286_656 + 6 * 32 * 4096 * 2048


@pytest.mark.parametrize(
    "grown",
    [
        {"d_model": 2 * 768},
        {"n_layers": 24},
        {"max_seq_len": 4096},
        {"vocab_size": 2 * 50_432},
        {"expansion_ratio": 8},
        {"clip_qkv": 6.0},
        {"resid_pdrop": 0.1},
        {"attn_pdrop": 0.1},
        {"emb_pdrop": 0.1},
    ],
)
def test_nothing_gets_cheaper_when_a_model_grows(grown: dict[str, Any]) -> None:
    small = mpt("125m")
    large = replace(small, **grown)
    assert flops_per_token(large) >= flops_per_token(small)
    assert state_bytes_per_rank(large, 8) >= state_bytes_per_rank(small, 8)
    assert activation_bytes(large, 4, "bf16") > activation_bytes(small, 4, "bf16")


def test_state_is_sharded_but_for_the_working_copy() -> None:
    model = mpt("7b")
    copy = 2 * (12 * 4096**2 + 2 * 4096 + 50_432 * 4096 + 4096)
    assert state_bytes_per_rank(model, 1) == 16 * n_parameters(model) + copy
    assert state_bytes_per_rank(model, 8) == 2 * n_parameters(model) + copy
    assert state_bytes_per_rank(model, 10**9) >= copy


def test_a_plan_adds_up() -> None:
    tiny = recipe.load(
        TINY, ["train.steps=301", "train.global_batch_size=32", "train.microbatch_size=64"]
    )
    got = plan(tiny, world_size=3)
    assert got.n_parameters == n_parameters(tiny.model)
    assert got.tokens_per_step == 32 * 256
    assert got.total_tokens == 301 * 32 * 256
    assert got.total_flops == got.flops_per_token * got.total_tokens
    assert got.state_bytes_per_rank == state_bytes_per_rank(tiny.model, 3)
    assert got.memory_bytes_per_rank == got.state_bytes_per_rank + got.activation_bytes
    assert got.microbatch_size == 11  # of 32 samples, no rank of three has more
    assert got.activation_bytes == activation_bytes(tiny.model, 11, "bf16")
    assert (got.n_checkpoints, got.n_checkpoints_kept) == (4, 3)  # 100, 200, 300 and the last
    assert got.bytes_per_checkpoint == 12 * n_parameters(tiny.model)


def test_a_plan_names_what_it_took_for_auto() -> None:
    got = plan(recipe.load(TINY), world_size=1)
    assert (got.microbatch_size, got.precision) == (1, "bf16")
    assert plan(recipe.load(TINY, ["train.precision=fp32"]), world_size=1).precision == "fp32"
    assert got.attention == "blocks"
    assert plan(recipe.load(TINY), world_size=1, attention="flex").attention == "flex"
    sdpa = plan(recipe.load(TINY, ["train.attention=sdpa"]), world_size=1, attention="flex")
    assert sdpa.attention == "sdpa", "what the recipe says wins"
    assert sdpa.activation_bytes == activation_bytes(recipe.load(TINY).model, 1, "bf16", "sdpa")
    full = plan(recipe.load(TINY), world_size=1, recompute="full")
    assert full.recompute == "full"
    assert full.activation_bytes == activation_bytes(
        recipe.load(TINY).model, 1, "bf16", "blocks", "full"
    )
    named = recipe.load(TINY, ["train.activation_checkpointing=selective"])
    assert plan(named, world_size=1, recompute="full").recompute == "selective"
