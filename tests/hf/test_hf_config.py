"""Laws of config.json: what transformers ignores is refused by name; the rest comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt.errors import CheckpointError, UsageError
from mpt.hf.config import (
    _OBEYED,
    _TRAINING_ONLY,
    _WRITTEN,
    config_json,
    model_from_config,
    unsupported,
)
from mpt.recipe.model import FIXED, Model

transformers = pytest.importorskip("transformers")

IGNORED_BY_TRANSFORMERS: dict[str, Any] = {
    "expansion_ratio": 2,
    "learned_pos_emb": True,
    "logit_scale": 0.5,
    "no_bias": False,
    "norm_type": "rmsnorm",
    "embedding_fraction": 0.5,
}
IGNORED_IN_ATTENTION: dict[str, Any] = {
    "alibi": False,
    "alibi_bias_max": 16,
    "attn_type": "multiquery_attention",
    "qk_ln": True,
    "attn_uses_sequence_id": True,
}
UNKNOWN_TO_TRANSFORMERS: dict[str, Any] = {
    "attention_bias": True,
    "kv_n_heads": 2,
    "qk_gn": True,
    "rope": True,
    "sliding_window_size": 64,
    "head_dim": 32,
    "ffn_type": "mptglu",
    "act_fn": "relu",
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "block_overrides": {},
    "ffn_hidden_size": 100,
}


def config_of(model: Model) -> dict[str, Any]:
    return config_json(model, dtype="float32", eod_id=0)


def logits_in_transformers(config: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    network = transformers.MptForCausalLM(transformers.MptConfig(**config)).eval()
    with torch.inference_mode():
        logits: torch.Tensor = network(torch.arange(40)[None]).logits
    return logits


@pytest.mark.parametrize(("key", "value"), [("expansion_ratio", 2), ("alibi_bias_max", 16)])
def test_an_option_that_transformers_ignores_is_refused_by_name(
    model: Model, key: str, value: int
) -> None:
    with pytest.raises(UsageError, match=f"model.{key}: {value} would be silently taken for"):
        config_of(replace(model, **{key: value}))


def test_all_offending_options_are_named_at_once(model: Model) -> None:
    reasons = unsupported(replace(model, expansion_ratio=2, alibi_bias_max=16))
    assert [reason.split(":")[0] for reason in reasons] == [
        "model.alibi_bias_max",
        "model.expansion_ratio",
    ]


def test_options_that_are_not_built_yet_are_refused_once_they_are(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in FIXED.keys() & _OBEYED.keys():
        monkeypatch.setitem(FIXED, key, "something new")
        assert unsupported(model)[0].startswith(f"model.{key}: 'something new'")
        monkeypatch.undo()
    monkeypatch.setitem(FIXED, "mixture", None)
    assert unsupported(model) == ["model.mixture: is not known to the export"]


def test_every_model_option_has_a_place_in_the_export(model: Model) -> None:
    assert unsupported(model) == []
    assert {**FIXED, **vars(model)}.keys() == {*_OBEYED, *_WRITTEN, *_TRAINING_ONLY}


@pytest.mark.parametrize("key", IGNORED_BY_TRANSFORMERS | IGNORED_IN_ATTENTION)
def test_transformers_really_ignores_what_is_refused(model: Model, key: str) -> None:
    config = config_of(model)
    expected = logits_in_transformers(config)
    changed = (IGNORED_BY_TRANSFORMERS | IGNORED_IN_ATTENTION)[key]
    if key in IGNORED_IN_ATTENTION:
        config["attn_config"][key] = changed
    else:
        config[key] = changed
    assert torch.equal(logits_in_transformers(config), expected)
    assert _OBEYED[key] != changed  # so it is refused


@pytest.mark.parametrize(("key", "value"), [("clip_qkv", 0.01), ("softmax_scale", 3.0)])
def test_transformers_obeys_what_is_written(model: Model, key: str, value: float) -> None:
    expected = logits_in_transformers(config_of(model))
    changed: dict[str, Any] = {key: value}
    other = logits_in_transformers(config_of(replace(model, **changed)))
    assert not torch.allclose(other, expected)


def test_a_config_comes_back_as_the_model_it_was(model: Model) -> None:
    assert model_from_config(config_of(model)) == replace(model, attn_pdrop=0.0)


def test_a_config_saved_by_transformers_is_read(model: Model, tmp_path: Path) -> None:
    transformers.MptConfig(**config_of(model)).save_pretrained(tmp_path)
    saved = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    assert model_from_config(saved) == replace(model, attn_pdrop=0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    (
        IGNORED_BY_TRANSFORMERS
        | IGNORED_IN_ATTENTION
        | UNKNOWN_TO_TRANSFORMERS
        | {"prefix_lm": True}
    ).items(),
)
@pytest.mark.parametrize("place", ["config", "attn_config"])
def test_a_config_with_an_option_that_is_not_built_is_refused_by_name(
    model: Model, key: str, value: object, place: str
) -> None:
    config = config_of(model)
    for part in (config, config["attn_config"]):
        part.pop(key, None)
    (config if place == "config" else config["attn_config"])[key] = value
    with pytest.raises(CheckpointError, match=f"config.json: {key}: .* is not built"):
        model_from_config(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": 1}, "surprise: is not an option"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'mpt'"),
        ({"d_model": "48"}, "d_model: '48' is not a whole number"),
        ({"n_layers": True}, "n_layers: True is not a whole number"),
        ({"n_heads": 5}, "5 heads do not divide"),
        ({"n_layers": -1}, "n_layers: -1 is too small"),
        ({"resid_pdrop": None}, "resid_pdrop: None is not a number"),
        ({"clip_qkv": float("nan")}, "clip_qkv: nan is not a positive number"),
        ({"layer_norm_epsilon": 1e-6}, "norm_eps: 1e-06 is not built"),
        ({"attn_pdrop": 0.5}, "attn_pdrop: is 0.5, and 0 in attn_config"),
        ({"attn_config": 3}, "attn_config is not a mapping"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False is not built"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_key(
    model: Model, change: dict[str, Any], said: str
) -> None:
    config = config_of(model)
    config["attn_config"].pop("clip_qkv")
    with pytest.raises(CheckpointError, match=said):
        model_from_config(config | change)
