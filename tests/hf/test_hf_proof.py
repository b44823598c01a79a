"""Laws of the proof: an export that is wrong is found out, and nothing of it is left."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpt.checkpoint.weights import Weights
from mpt.errors import ExportError
from mpt.hf import config, tokenizer
from mpt.hf.export import export
from mpt.model import position
from mpt.recipe.model import Model

pytest.importorskip("transformers")


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_proof_uses_no_internet(
    weights: Weights,
    model: Model,
    tokenizer_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"tried to reach {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert export(weights, model, tokenizer_file, tmp_path / "out").proved


def wrong_alibi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpt.hf.load.alibi_slopes", lambda h, b: position.alibi_slopes(h, b + 1))


def wrong_config(monkeypatch: pytest.MonkeyPatch) -> None:
    true = config.config_json
    monkeypatch.setattr(
        "mpt.hf.export.config_json",
        lambda *a, **k: true(*a, **k) | {"attn_config": {"clip_qkv": 1.4}},
    )


def renamed_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(
            {name.replace("norm_f", "ln_f"): t for name, t in tensors.items()}, path, metadata
        )

    monkeypatch.setattr("mpt.hf.shards.save_file", rename)


def wrong_class(monkeypatch: pytest.MonkeyPatch) -> None:
    true = tokenizer._tokenizer_config
    monkeypatch.setattr(
        tokenizer,
        "_tokenizer_config",
        lambda *a: {k: v for k, v in true(*a).items() if k != "tokenizer_class"},
    )


def special_tokens_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    true = tokenizer._tokenizer_config
    monkeypatch.setattr(
        tokenizer, "_tokenizer_config", lambda *a: true(*a) | {"split_special_tokens": False}
    )


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (wrong_alibi, "logits in transformers .* differ"),
        (wrong_config, "logits in transformers .* differ"),
        (renamed_tensor, r"does not take the weights as they are: .*ln_f"),
        (wrong_class, "AutoTokenizer gives other ids"),
        (special_tokens_in_text, "AutoTokenizer gives other ids"),
    ],
)
def test_an_export_that_fails_its_proof_leaves_nothing(
    weights: Weights,
    model: Model,
    tokenizer_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    said: str,
) -> None:
    break_it(monkeypatch)
    with pytest.raises(ExportError, match=said):
        export(weights, model, tokenizer_file, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_without_transformers_the_export_says_that_it_is_not_proved(
    weights: Weights, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = export(weights, model, None, tmp_path / "out")
    assert not result.proved
    assert result.proof is None


def test_a_failed_overwrite_keeps_the_old_export(
    weights: Weights, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(weights, model, None, out)
    old = (out / "model.safetensors").read_bytes()
    wrong_alibi(monkeypatch)
    with pytest.raises(ExportError):
        export(weights, model, None, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == old
    assert left_behind(tmp_path) == ["out"]


def test_large_logits_get_the_tolerance_that_fp32_needs_and_no_more(
    make_weights: Callable[[Model], Weights],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = make_weights(model)
    path = weights.directory / "weights.safetensors"
    tensors = load_file(path)
    tensors["transformer.norm_f.weight"] *= 3000.0
    save_file(tensors, path)
    proof = export(weights, model, None, tmp_path / "out").proof
    assert proof is not None
    assert proof.max_difference > 1e-4
    wrong_alibi(monkeypatch)
    with pytest.raises(ExportError, match="differ"):
        export(weights, model, None, tmp_path / "wrong")
