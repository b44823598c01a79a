"""The arithmetic of a recipe: parameters, FLOPs, memory and disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpt import recipe
from mpt.recipe.budget import (
    activation_bytes,
    auto_microbatch_size,
    causal_flops_per_token,
    flops_per_token,
    plan,
    state_bytes_per_rank,
)
from mpt.recipe.model import Model

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
    assert mpt(size).n_parameters == SIZES[size][3]


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
def test_nothing_gets_cheaper_when_a_model_grows(grown: dict[str, int]) -> None:
    small = mpt("125m")
    large = replace(small, **grown)
    assert flops_per_token(large) >= flops_per_token(small)
    assert state_bytes_per_rank(large, 8) >= state_bytes_per_rank(small, 8)
    assert activation_bytes(large, 4, "bf16") > activation_bytes(small, 4, "bf16")


def test_state_is_sharded_but_for_the_working_copy() -> None:
    model = mpt("7b")
    copy = 2 * (12 * 4096**2 + 2 * 4096 + 50_432 * 4096)
    assert state_bytes_per_rank(model, 1) == 16 * model.n_parameters + copy
    assert state_bytes_per_rank(model, 8) == 2 * model.n_parameters + copy
    assert state_bytes_per_rank(model, 10**9) >= copy


def test_activations_grow_with_the_microbatch_and_the_width_of_a_number() -> None:
    model = mpt("1b")
    sizes = [activation_bytes(model, size, "bf16") for size in (1, 2, 3, 4, 8)]
    assert sizes == sorted(set(sizes))
    per_sample = sizes[1] - sizes[0]
    assert sizes[3] - sizes[2] == per_sample  # only the head's part does not grow
    assert sizes[0] - per_sample == 50_432 * (512 * (4 + 4 + 2) + 4 * 2048)
    fp32 = activation_bytes(model, 1, "fp32")
    assert sizes[0] < fp32 < 2 * sizes[0]


def test_the_head_is_charged_for_a_chunk_and_never_for_all_logits() -> None:
    model = replace(mpt("125m"), n_layers=1)
    assert activation_bytes(model, 64, "bf16") < 64 * 2048 * 50_432 * 4


@pytest.mark.parametrize("share", [1, 2, 3, 31, 32, 33, 1000])
@pytest.mark.parametrize("budget_bytes", [0, GIB, 10 * GIB, 70 * GIB, 10**18])
def test_auto_takes_the_fewest_microbatches_that_fit(share: int, budget_bytes: int) -> None:
    model = mpt("1b")
    size = auto_microbatch_size(model, share=share, budget_bytes=budget_bytes, precision="bf16")
    n_microbatches = -(-share // size)
    assert 1 <= size <= share
    assert size == 1 or activation_bytes(model, size, "bf16") <= budget_bytes
    if n_microbatches > 1:
        fewer = -(-share // (n_microbatches - 1))
        assert activation_bytes(model, fewer, "bf16") > budget_bytes
    assert n_microbatches * size - share < n_microbatches, "no sample of padding too many"


def test_a_plan_adds_up() -> None:
    tiny = recipe.load(
        TINY, ["train.steps=301", "train.global_batch_size=32", "train.microbatch_size=64"]
    )
    got = plan(tiny, world_size=3)
    assert got.n_parameters == tiny.model.n_parameters
    assert got.tokens_per_step == 32 * 256
    assert got.total_tokens == 301 * 32 * 256
    assert got.total_flops == got.flops_per_token * got.total_tokens
    assert got.state_bytes_per_rank == state_bytes_per_rank(tiny.model, 3)
    assert got.microbatch_size == 11  # of 32 samples, no rank of three has more
    assert got.activation_bytes == activation_bytes(tiny.model, 11, "bf16")
    assert (got.n_checkpoints, got.n_checkpoints_kept) == (4, 3)  # 100, 200, 300 and the last
    assert got.bytes_per_checkpoint == 12 * tiny.model.n_parameters


def test_a_plan_names_what_it_took_for_auto() -> None:
    got = plan(recipe.load(TINY), world_size=1)
    assert (got.microbatch_size, got.precision) == (1, "bf16")
    assert plan(recipe.load(TINY, ["train.precision=fp32"]), world_size=1).precision == "fp32"
