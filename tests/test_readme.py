"""What the README says of models and exports is what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mpt.hf.config import expressible
from mpt.hf.gguf_names import unsupported_by_gguf
from mpt.recipe.model import Model
from mpt.recipe.plain import model_from

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SMALL = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 128}
LLAMA = {
    "alibi": False,
    "rope": True,
    "norm_type": "rmsnorm",
    "ffn_type": "mptglu",
    "act_fn": "silu",
}
SHARED = {
    "order": [{"name": "default"}, {"name": "same"}],
    "overrides": {"same": {"reuse_kv_layer_idx": -1}},
}

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "`alibi`": [{"alibi": True}],
    "`alibi_bias_max`": [{"alibi": True, "alibi_bias_max": 16}],
    "`rope`, `rope_theta`": [{"alibi": False, "rope": True, "rope_theta": 5e5}],
    "`rope_hf_config`": [
        {"alibi": False, "rope": True, "rope_hf_config": {"type": kind, "factor": 2.0} | more}
        for kind, more in (
            ("linear", {}),
            ("dynamic", {}),
            ("llama3", {"original_max_position_embeddings": 32}),
        )
    ],
    "`learned_pos_emb`": [{"alibi": False, "rope": False, "learned_pos_emb": True}],
    "none of the three": [{"alibi": False, "rope": False}],
    "`kv_n_heads`, `attn_type`": [{"kv_n_heads": 2}, {"attn_type": "multiquery_attention"}],
    "`head_dim`": [{"head_dim": 32}],
    "`clip_qkv`": [{"clip_qkv": 3.0}],
    "`softmax_scale`": [{"softmax_scale": 0.1}],
    "`qk_ln`, `qk_gn`": [{"qk_ln": True}, {"qk_gn": True}],
    "`attn_logit_softcapping`": [{"attn_logit_softcapping": 5.0}],
    "`sliding_window_size`": [{"sliding_window_size": 8}],
    "`attn_uses_sequence_id`": [{"attn_uses_sequence_id": True}],
    "`attention_bias`": [{"attention_bias": True}],
    "`ffn_type: mptglu`": [{"ffn_type": "mptglu"}],
    "`expansion_ratio`, `ffn_hidden_size`": [{"expansion_ratio": 2.5}, {"ffn_hidden_size": 100}],
    "`norm_eps`": [{"norm_eps": 1e-6}],
    "`no_bias: false`": [{"no_bias": False}],
    "`tie_word_embeddings: false`": [{"tie_word_embeddings": False}],
    "`logit_scale`, `final_logit_softcapping`": [
        {"logit_scale": 0.5},
        {"final_logit_softcapping": 5.0},
    ],
    "`block_overrides`": [{"block_overrides": SHARED}],
    "`emb_pdrop`, `resid_pdrop`, `attn_pdrop`, `embedding_fraction`, `init_config`": [
        {"emb_pdrop": 0.1},
        {"resid_pdrop": 0.1},
        {"attn_pdrop": 0.1},
        {"embedding_fraction": 0.5},
        {"init_config": {"name": "small_init_"}},
    ],
}
"""The option alone; for a Llama, on top of what makes one."""

BY_VALUE = {
    "act_fn": ("gelu", "gelu_tanh", "relu", "silu", "mish", "elu", "tanh"),
    "norm_type": ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"),
}
"""Options whose cells name the values that are carried."""

CARRIED: dict[str, dict[str, set[str]]] = {
    "act_fn": {
        "`gelu`": {"gelu"},
        "all but `elu`": {"gelu", "gelu_tanh", "relu", "silu", "mish", "tanh"},
        "`gelu`, `gelu_tanh`": {"gelu", "gelu_tanh"},
    },
    "norm_type": {
        "LayerNorm": {"layernorm", "low_precision_layernorm"},
        "RMSNorm": {"rmsnorm", "low_precision_rmsnorm"},
    },
}


def rows() -> dict[str, list[str]]:
    section = README.split("\n## Models\n")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if re.match(r"\| (`|none)", line)
    ]
    return {row[0]: row[2:] for row in cells}


def as_mpt(change: dict[str, Any]) -> bool:
    return expressible(model_from(SMALL | change))[0] == "mpt"


def as_llama(change: dict[str, Any]) -> bool:
    if change.get("alibi"):
        return False  # not beside RoPE
    return expressible(model_from(SMALL | LLAMA | change))[0] == "llama"


def as_gguf(change: dict[str, Any]) -> bool:
    return not unsupported_by_gguf(model_from(SMALL | change))


WAYS = (as_mpt, as_llama, as_gguf)


def test_the_table_of_options_has_every_one() -> None:
    named = set(re.findall(r"\w+", " ".join(rows())))
    sizes = set(SMALL)
    assert set(Model.__dataclass_fields__) - sizes <= named
    assert rows().keys() == EXAMPLES.keys() | {f"`{key}`" for key in BY_VALUE}


@pytest.mark.parametrize("option", EXAMPLES)
def test_the_table_says_which_export_carries_an_option(option: str) -> None:
    for cell, carries in zip(rows()[option], WAYS, strict=True):
        assert {carries(change) for change in EXAMPLES[option]} == {cell == "yes"}, cell
        assert cell in ("yes", "no")


@pytest.mark.parametrize("option", BY_VALUE)
def test_the_table_says_which_values_an_export_carries(option: str) -> None:
    for cell, carries in zip(rows()[f"`{option}`"], WAYS, strict=True):
        found = {value for value in BY_VALUE[option] if carries({option: value})}
        assert found == CARRIED[option][cell]
