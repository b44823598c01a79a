"""How weights begin: each scheme against torch's own, each knob, at any world size."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpt.dist import Ranks
from mpt.model.init import initialise
from mpt.model.network import MPT
from mpt.recipe.init import Init
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from tests.tiny_model import digest, sharded, weights_of
from tests.world import on_ranks

# Every kind of parameter, each of a shape of its own, and enough values to see their spread.
ALL = Model(
    d_model=96,
    n_heads=4,
    n_layers=3,
    kv_n_heads=2,
    head_dim=40,
    ffn_type="mptglu",
    ffn_hidden_size=250,
    max_seq_len=130,
    vocab_size=333,
    alibi=False,
    learned_pos_emb=True,
    tie_word_embeddings=False,
    no_bias=False,
    qk_ln=True,
    block_overrides=BlockOverrides(
        order=(Order(name="default"), Order(name="borrows"), Order(name="default")),
        overrides={"borrows": Override(reuse_kv_layer_idx=-1)},
    ),
)
RESIDUAL = ("out_proj.weight", "down_proj.weight")


def weights(init: Init, cfg: Model = ALL, seed: int = 5) -> dict[str, Tensor]:
    cfg = replace(cfg, init_config=init)
    assert list(cfg.problems()) == []
    model = MPT(cfg)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    initialise(model, cfg, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def is_norm(name: str) -> bool:
    return ".norm_" in name or "_ln." in name


def matrices(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in of.items() if weight.ndim == 2}


def as_torch_draws(name: str, weight: Tensor, init: Init) -> Tensor:
    """Return what torch's own function of this name gives for a matrix, or for one head's."""
    rows = ALL.head_width if ".Wq" in name else weight.shape[0]
    like = torch.empty(rows, weight.shape[1])
    match init.name:
        case "kaiming_normal_" | "kaiming_uniform_":
            draw = getattr(nn.init, init.name)
            slope, mode = init.init_gain, init.fan_mode
            return draw(like, a=slope, mode=mode, nonlinearity=init.init_nonlinearity)  # type: ignore[no-any-return]
        case "xavier_normal_" | "xavier_uniform_":
            return getattr(nn.init, init.name)(like, gain=init.init_gain)  # type: ignore[no-any-return]
        case "small_init_" | "neox_init_":
            return nn.init.normal_(like, std=math.sqrt(2 / (5 * ALL.d_model)))
        case _:
            assert init.init_std is not None
            return nn.init.normal_(like, std=init.init_std)


SCHEMES = [
    Init(),
    Init(name="baseline_", init_std=0.013),
    Init(name="small_init_"),
    Init(name="neox_init_"),
    Init(init_nonlinearity="leaky_relu", init_gain=0.7, fan_mode="fan_out"),
    Init(init_nonlinearity="tanh"),
    Init(name="kaiming_uniform_"),
    Init(name="kaiming_uniform_", fan_mode="fan_out", init_nonlinearity="selu"),
    Init(name="xavier_normal_", init_gain=1.0),
    Init(name="xavier_uniform_", init_gain=2.5),
]


@pytest.mark.parametrize("init", SCHEMES, ids=str)
def test_matrices_are_spread_as_torch_spreads_them(init: Init) -> None:
    torch.manual_seed(0)
    divisors = {"neox_init_": ALL.n_layers / math.sqrt(10)}
    residual = divisors.get(init.name, math.sqrt(2 * ALL.n_layers))
    for name, weight in matrices(weights(init)).items():
        if is_norm(name):
            continue
        torchs = as_torch_draws(name, weight, init) / (residual if name.endswith(RESIDUAL) else 1.0)
        # 3,840 values at least: their standard deviation is known to 1.2 %, twice over.
        assert float(weight.std() / torchs.std()) == pytest.approx(1, abs=0.07), name
        assert abs(float(weight.mean() / weight.std())) < 0.06, name
        most = float(weight.abs().max() / torchs.abs().max())
        if init.name.endswith("uniform_"):
            assert most == pytest.approx(1, abs=0.01), name  # both end where the interval does
        else:
            assert float(weight.abs().max() / weight.std()) > 3, name


@pytest.mark.parametrize("init", SCHEMES, ids=str)
def test_norms_begin_as_nothing_at_all_and_biases_as_zeros(init: Init) -> None:
    for name, vector in weights(init).items():
        if is_norm(name):
            assert torch.all(vector == (1.0 if name.endswith("weight") else 0.0)), name
        elif name.endswith("bias"):
            assert torch.all(vector == 0.0), name


def test_default_is_what_torch_makes_of_linears_and_embeddings() -> None:
    for name, weight in weights(Init(name="default_")).items():
        if is_norm(name):
            assert torch.all(weight == (1.0 if name.endswith("weight") else 0.0)), name
        elif ".wte" in name or ".wpe" in name:
            assert float(weight.std()) == pytest.approx(1, abs=0.03), name
        else:
            fan_in = {"out_proj": 160, "down_proj": 250}.get(name.split(".")[-2], 96)
            torchs = nn.Linear(fan_in, 400).requires_grad_(False)
            largest = float(max(torchs.weight.abs().max(), torchs.bias.abs().max()))
            assert float(weight.abs().max()) == pytest.approx(largest, rel=0.05), name
            assert float(weight.std()) == pytest.approx(float(torchs.weight.std()), rel=0.15), name


@pytest.mark.parametrize(
    "knob", [{"init_div_is_residual": 2.0}, {"emb_init_std": 0.1}, {"emb_init_uniform_lim": 0.1}]
)
def test_a_knob_that_default_would_not_hear_is_refused(knob: dict[str, Any]) -> None:
    assert [problem.key for problem in Init(name="default_", **knob).problems()] == [
        f"model.init_config.{key}" for key in knob
    ]
    assert list(Init(**knob).problems()) == []


def test_each_head_is_a_matrix_of_its_own_where_the_rows_count() -> None:
    # fan_out of a fused projection would be 4 + 2 + 2 heads of 40 rows; of queries alone, 4.
    of = weights(Init(fan_mode="fan_out"))
    for name in ("0.attn.Wqkv", "1.attn.Wq"):
        weight = of[f"transformer.blocks.{name}.weight"]
        for head in weight.split(ALL.head_width):
            assert float(head.std()) == pytest.approx(math.sqrt(2 / 40), rel=0.05)


@pytest.mark.parametrize(("divisor", "n"), [(False, 1.0), (2.5, 2.5), (True, math.sqrt(6))])
def test_what_adds_to_the_residual_stream_is_divided_and_nothing_else(
    divisor: bool | float, n: float
) -> None:
    whole = weights(Init(init_div_is_residual=False))
    for name, weight in weights(Init(init_div_is_residual=divisor)).items():
        torch.testing.assert_close(weight, whole[name] / (n if name.endswith(RESIDUAL) else 1.0))


@pytest.mark.parametrize(
    ("knob", "low", "high"),
    [
        ({"emb_init_std": 0.2}, None, None),
        ({"emb_init_std": 0.0}, 0.0, 0.0),
        ({"emb_init_uniform_lim": 0.3}, -0.3, 0.3),
        ({"emb_init_uniform_lim": (-0.1, 0.5)}, -0.1, 0.5),
    ],
)
def test_embeddings_have_a_spread_of_their_own(
    knob: dict[str, Any], low: float | None, high: float | None
) -> None:
    usual, own = weights(Init()), weights(Init(**knob))
    for name, weight in own.items():
        if ".wte" not in name and ".wpe" not in name:
            assert torch.equal(weight, usual[name]), f"{name} is no embedding"
        elif low is None:
            assert float(weight.std()) == pytest.approx(0.2, rel=0.03)
        else:
            ends = float(weight.min()), float(weight.max())
            assert ends == pytest.approx((low, high), abs=1e-3)


def test_an_embedding_without_one_is_a_matrix_of_fan_in_d_model() -> None:
    of = weights(Init(init_nonlinearity="linear", fan_mode="fan_out"))
    assert float(of["transformer.wte.weight"].std()) == pytest.approx(1 / math.sqrt(333), rel=0.03)
    assert float(of["transformer.wpe.weight"].std()) == pytest.approx(1 / math.sqrt(130), rel=0.03)
    of = weights(Init(init_nonlinearity="linear"))
    assert float(of["transformer.wte.weight"].std()) == pytest.approx(1 / math.sqrt(96), rel=0.03)


def test_weights_are_a_function_of_the_seed_and_no_two_are_alike() -> None:
    init = Init(name="default_")
    assert digest(weights(init)) == digest(weights(init)) != digest(weights(init, seed=6))
    of = weights(init)
    firsts = {float(weight.flatten()[0]) for name, weight in of.items() if not is_norm(name)}
    assert len(firsts) == sum(not is_norm(name) for name in of), "two were drawn from one stream"


def weights_on(ranks: Ranks, inits: list[Init]) -> list[dict[str, Tensor]]:
    return [weights_of(sharded(ranks, replace(ALL, init_config=init), seed=5)) for init in inits]


def test_weights_do_not_depend_on_the_world_size() -> None:
    inits = [Init(), Init(name="default_"), Init(name="xavier_uniform_", init_gain=1.0)]
    alone = [weights(init) for init in inits]
    for on_rank in on_ranks(2, weights_on, inits):
        for one, many in zip(alone, on_rank, strict=True):
            assert digest(one) == digest(many)


def test_the_released_profile_draws_the_same_numbers_for_ever() -> None:
    """What a run of the default recipe began with must not change with the code."""
    model = Model(d_model=192, n_heads=3, n_layers=4, max_seq_len=256, vocab_size=500)
    for name, weight in matrices(weights(model.init_config, model, seed=17)).items():
        std = math.sqrt(2 / weight.shape[1]) / (math.sqrt(8) if name.endswith(RESIDUAL) else 1)
        for number, block in enumerate(weight.split(64)):
            seed = hashlib.blake2b(f"17:{name}:{number}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
            drawn = torch.randn(64, weight.shape[1], generator=generator) * std
            assert torch.equal(block, drawn[: len(block)])
