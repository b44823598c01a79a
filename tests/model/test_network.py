"""The network is MPT: its names, its sizes, its numbers, whatever the options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MptConfig, MptForCausalLM

from mpt.model.cache import PADDING, Cache
from mpt.model.network import MPT, Norm
from mpt.recipe.model import Model
from mpt.recipe.plain import model_from
from mpt.state import Loss
from tests.model import reference
from tests.tiny_model import TINY

SHARING = {
    "order": [{"name": "default"}, {"order": [{"name": "near"}, {"name": "same"}]}],
    "overrides": {
        "near": {"sliding_window_size": 3},
        "same": {"sliding_window_size": 5, "reuse_kv_layer_idx": -1},
    },
}

OPTIONS: dict[str, dict[str, Any]] = {
    "released": {},
    "5 heads": {"d_model": 40, "n_heads": 5},
    "clip_qkv": {"clip_qkv": 0.8},
    "softmax_scale": {"softmax_scale": 0.11},
    "grouped": {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
    "multi-query": {"attn_type": "multiquery_attention"},
    "head_dim": {"head_dim": 12, "kv_n_heads": 2},
    "qk_ln": {"qk_ln": True, "kv_n_heads": 2, "clip_qkv": 0.8},
    "qk_gn": {"qk_gn": True, "kv_n_heads": 2, "no_bias": False},
    "window": {"sliding_window_size": 4},
    "attn_logit_softcapping": {"attn_logit_softcapping": 1.5},
    "final_logit_softcapping": {"final_logit_softcapping": 4.0, "logit_scale": 0.5},
    "inv_sqrt_d_model": {"logit_scale": "inv_sqrt_d_model"},
    "biases": {"no_bias": False},
    "attention_bias": {"attention_bias": True},
    "alibi_bias_max": {"alibi_bias_max": 16},
    "no positions": {"alibi": False},
    "learned": {"alibi": False, "learned_pos_emb": True},
    "rope": {"alibi": False, "rope": True, "rope_theta": 300.0, "qk_ln": True},
    "rope linear": {
        "alibi": False,
        "rope": True,
        "rope_hf_config": {"type": "linear", "factor": 2.5},
    },
    "glu": {"ffn_type": "mptglu", "act_fn": "silu", "ffn_hidden_size": 44},
    "expansion_ratio": {"expansion_ratio": 2.5},
    "gelu_tanh": {"act_fn": "gelu_tanh"},
    "relu": {"act_fn": "relu"},
    "mish": {"act_fn": "mish"},
    "elu": {"act_fn": "elu"},
    "tanh": {"act_fn": "tanh"},
    "layernorm": {"norm_type": "layernorm", "norm_eps": 0.3},
    "rmsnorm": {"norm_type": "rmsnorm", "norm_eps": 0.3, "no_bias": False},
    "low_precision_rmsnorm": {"norm_type": "low_precision_rmsnorm"},
    "untied": {"tie_word_embeddings": False},
    "shared keys": {"n_layers": 3, "block_overrides": SHARING, "qk_ln": True},
}


def model(**change: Any) -> Model:
    return model_from(dataclasses.asdict(TINY) | change)


def random_network(cfg: Model) -> MPT:
    torch.manual_seed(0)
    network = MPT(cfg, "sdpa").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def some_tokens(cfg: Model, n_samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, cfg.vocab_size, (n_samples, cfg.max_seq_len), generator=generator)


def some_documents(cfg: Model) -> Tensor:
    """Two samples, cut differently: (2, S)."""
    cuts = torch.tensor([[3, 4, 11], [0, 8, 8]])
    return (torch.arange(cfg.max_seq_len)[None, None] >= cuts[:, :, None]).sum(1)


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_are_those_of_a_plain_reference(option: str) -> None:
    cfg = model(**OPTIONS[option])
    network, tokens = random_network(cfg), some_tokens(cfg)
    whole = reference.logits(cfg, network.state_dict(), tokens, torch.zeros_like(tokens))
    with torch.no_grad():
        torch.testing.assert_close(network(tokens).double(), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_documents_in_a_sample_are_read_as_if_apart(option: str) -> None:
    cfg = model(**OPTIONS[option], attn_uses_sequence_id=True)
    network, tokens, documents = random_network(cfg), some_tokens(cfg), some_documents(cfg)
    apart = reference.logits(cfg, network.state_dict(), tokens, documents)
    with torch.no_grad():
        together = network(tokens, documents=documents).double()
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_reading_in_pieces_through_a_cache_equals_reading_at_once(option: str) -> None:
    cfg = model(**OPTIONS[option])
    network, tokens = random_network(cfg), some_tokens(cfg)
    documents = torch.zeros_like(tokens)
    documents[0, :5] = PADDING  # a shorter prompt, filled up on its left
    cache = Cache(cfg, 2, cfg.max_seq_len, tokens.device, torch.float32)
    with torch.no_grad():
        pieces = [
            network(tokens[:, part], documents=documents[:, part], cache=cache)
            for part in torch.arange(cfg.max_seq_len).split([7, 1, 5, 3])
        ]
        expected = network(tokens, documents=documents)
        alone = network(tokens[:1, 5:])
    got = torch.cat(pieces, dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:1, 5:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", ["clip_qkv", "softmax_scale", "released", "5 heads"])
def test_logits_equal_transformers(option: str) -> None:
    cfg = model(**OPTIONS[option])
    network, tokens = random_network(cfg), some_tokens(cfg)
    with torch.no_grad():
        expected = _transformers(cfg, network)(tokens).logits
        torch.testing.assert_close(network(tokens), expected, rtol=1e-4, atol=1e-4)


def _transformers(cfg: Model, network: MPT) -> torch.nn.Module:
    config = MptConfig(
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_layers=cfg.n_layers,
        max_seq_len=cfg.max_seq_len,
        vocab_size=cfg.vocab_size,
        attn_config={"clip_qkv": cfg.clip_qkv, "softmax_scale": cfg.softmax_scale},
    )
    theirs: torch.nn.Module = MptForCausalLM(config).eval()
    missing, unexpected = theirs.load_state_dict(network.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()  # type: ignore[operator]
    return theirs


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


@pytest.mark.parametrize("option", ["released", "final_logit_softcapping", "untied"])
def test_loss_is_the_cross_entropy_of_the_logits(option: str) -> None:
    network = random_network(model(**OPTIONS[option]))
    tokens, targets = some_tokens(TINY), some_tokens(TINY).roll(1)
    logits = network(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    loss = network(tokens, targets)
    assert isinstance(loss, Loss)
    torch.testing.assert_close(loss.nats, expected.detach(), rtol=1e-5, atol=1e-3)
    weights = list(network.parameters())
    found = torch.autograd.grad(loss.objective, weights)
    for ours, theirs in zip(found, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_acts_in_training_and_only_there(where: str) -> None:
    network, plain = random_network(model(**{where: 0.5})), random_network(TINY)
    tokens = some_tokens(TINY)
    assert torch.equal(network(tokens), plain(tokens))
    network.train()
    assert not torch.equal(network(tokens), plain(tokens))


def test_a_fraction_of_the_gradient_reaches_the_embedding_and_no_logit_changes() -> None:
    cfg = model(tie_word_embeddings=False)
    networks = (
        random_network(cfg),
        random_network(dataclasses.replace(cfg, embedding_fraction=0.25)),
    )
    tokens = some_tokens(cfg)
    outs = [network(tokens) for network in networks]
    torch.testing.assert_close(outs[1], outs[0])
    for out in outs:
        out.square().sum().backward()
    whole, part = (network.transformer.wte.weight.grad for network in networks)
    assert whole is not None
    torch.testing.assert_close(part, whole * 0.25, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("how", ["", "low_precision_"])
def test_a_norm_in_bf16_computes_in_fp32(how: str, kind: str) -> None:
    torch.manual_seed(0)
    # In bf16, the sum of so many squares would be wrong in its second digit.
    x, gain = torch.randn(64, 4096).bfloat16() * 30, torch.randn(4096).bfloat16()
    low, exact = (Norm(model(norm_type=f"{how}{kind}"), 4096) for _ in range(2))
    low.weight.data, exact.weight.data = gain, gain.double()
    error = (low(x).double() - exact(x.double())).norm() / exact(x.double()).norm()
    assert error < 2.0**-8, "more than rounding the result to bf16 makes"
