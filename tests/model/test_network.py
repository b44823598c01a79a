"""The network is MPT: its names, its sizes, its numbers."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from mpt.model.network import MPT, NORM_EPS
from mpt.recipe.model import FIXED, Model
from tests.tiny_model import TINY

SIZES = {
    "125m": ((768, 12, 12), 123_685_632),
    "7b": ((4096, 32, 32), 6_649_286_656),
    "30b": ((7168, 64, 48), 29_957_200_896),
}


def random_network(cfg: Model) -> MPT:
    torch.manual_seed(0)
    network = MPT(cfg, "blocks").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def theirs(cfg: Model, network: MPT) -> torch.nn.Module:
    config = MptConfig(
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_layers=cfg.n_layers,
        max_seq_len=cfg.max_seq_len,
        vocab_size=cfg.vocab_size,
        attn_config={
            "clip_qkv": cfg.clip_qkv,
            "softmax_scale": cfg.softmax_scale,
            "alibi_bias_max": cfg.alibi_bias_max,
        },
    )
    model: torch.nn.Module = MptForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(network.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"clip_qkv": 0.8},
        {"softmax_scale": 0.11},
        {"n_heads": 1},
        {"d_model": 36, "n_heads": 6},
    ],
)
def test_logits_equal_transformers(change: dict[str, Any]) -> None:
    cfg = dataclasses.replace(TINY, **change)
    network = random_network(cfg)
    tokens = torch.randint(0, cfg.vocab_size, (2, cfg.max_seq_len))
    with torch.no_grad():
        torch.testing.assert_close(
            network(tokens), theirs(cfg, network)(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_names_are_hugging_faces_and_the_head_is_tied() -> None:
    block = [
        "norm_1.weight",
        "attn.Wqkv.weight",
        "attn.out_proj.weight",
        "norm_2.weight",
        "ffn.up_proj.weight",
        "ffn.down_proj.weight",
    ]
    expected = ["transformer.wte.weight"]
    expected += [f"transformer.blocks.{i}.{name}" for i in range(2) for name in block]
    expected += ["transformer.norm_f.weight"]
    assert list(MPT(TINY).state_dict()) == expected


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_released_ones(size: str) -> None:
    (d_model, n_heads, n_layers), count = SIZES[size]
    cfg = Model(
        d_model=d_model, n_heads=n_heads, n_layers=n_layers, max_seq_len=2048, vocab_size=50_432
    )
    with torch.device("meta"):
        network = MPT(cfg)
    assert sum(p.numel() for p in network.parameters()) == count == cfg.n_parameters


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    network = random_network(TINY)
    tokens = torch.randint(0, TINY.vocab_size, (3, TINY.max_seq_len))
    targets = torch.randint(0, TINY.vocab_size, (3, TINY.max_seq_len))
    expected = torch.nn.functional.cross_entropy(
        network(tokens).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(network(tokens, targets), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("where", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_acts_in_training_and_only_there(where: str) -> None:
    network = random_network(dataclasses.replace(TINY, **cast(dict[str, Any], {where: 0.5})))
    plain = random_network(TINY)
    tokens = torch.randint(0, TINY.vocab_size, (2, TINY.max_seq_len))
    assert torch.equal(network(tokens), plain(tokens))
    network.train()
    assert not torch.equal(network(tokens), plain(tokens))


def test_the_released_profile_is_what_is_built() -> None:
    assert FIXED["norm_eps"] == NORM_EPS
