"""Laws of the proof: an export that is wrong is found out, and nothing of it is left."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpt.checkpoint.stream import Form, write_file
from mpt.checkpoint.weights import Weights
from mpt.errors import ExportError
from mpt.hf import config, tokenizer
from mpt.hf.export import export
from mpt.hf.prove import Proof
from mpt.model import position
from mpt.model.network import MPT
from mpt.recipe.model import Model

from .test_hf_config import LLAMA

pytest.importorskip("transformers")


DEEP = Model(d_model=32, n_heads=4, n_layers=5, max_seq_len=40, vocab_size=90)


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
    true = position.alibi_slopes
    monkeypatch.setattr("mpt.model.network.alibi_slopes", lambda h, b: true(h, b + 1))


def wrong_config(monkeypatch: pytest.MonkeyPatch) -> None:
    true = config.config_json
    monkeypatch.setattr(
        "mpt.hf.export.config_json",
        lambda *a, **k: true(*a, **k) | {"attn_config": {"clip_qkv": 1.4}},
    )


def renamed_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(path: Path, forms: dict[str, Form], read: Callable[[str], torch.Tensor]) -> None:
        names = {name.replace("norm_f", "ln_f"): name for name in forms}
        write_file(path, {new: forms[old] for new, old in names.items()}, lambda n: read(names[n]))

    monkeypatch.setattr("mpt.hf.shards.write_file", rename)


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


def generates_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mpt.hf.export._generation_config", lambda eod_id: {"repetition_penalty": 3.0}
    )


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (generates_otherwise, "generates tokens, greedily, that are not the likeliest"),
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


@pytest.mark.parametrize("shape", [DEEP, replace(LLAMA, n_layers=5)])
def test_of_a_model_that_is_too_large_the_first_blocks_are_asked_and_all_tensors_compared(
    make_weights: Callable[[Model], Weights], tmp_path: Path, shape: Model
) -> None:
    sizes = {n: 4 * t.numel() for n, t in MPT(shape).state_dict().items()}
    whole = sum(sizes.values())
    last = sum(size for name, size in sizes.items() if ".blocks.4." in name)
    weights = make_weights(shape)
    for proof_bytes, n_layers in [(whole, 5), (whole - 1, 4), (whole - 3 * last, 2), (1, 1)]:
        out = tmp_path / f"{proof_bytes}"
        proof = export(weights, shape, None, out, dtype="bf16", proof_bytes=proof_bytes).proof
        assert isinstance(proof, Proof)
        assert proof.n_layers == n_layers
        assert proof.n_tensors == (0 if n_layers == 5 else len(sizes))
    assert "with the first 1 blocks" in (tmp_path / "1/README.md").read_text()


def test_a_wrong_tensor_above_the_blocks_that_are_asked_is_found(
    make_weights: Callable[[Model], Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slip(path: Path, forms: dict[str, Form], read: Callable[[str], torch.Tensor]) -> None:
        def wrong(name: str) -> torch.Tensor:
            tensor = read(name)
            if name == "transformer.blocks.4.ffn.up_proj.weight":
                tensor[-1, -1] *= -1
            return tensor

        write_file(path, forms, wrong)

    monkeypatch.setattr("mpt.hf.shards.write_file", slip)
    with pytest.raises(ExportError, match=r"blocks.4.ffn.up_proj.weight is not what was to be"):
        export(make_weights(DEEP), DEEP, None, tmp_path / "out", proof_bytes=1)
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
    assert isinstance(proof, Proof)
    assert proof.max_difference > 1e-4
    wrong_alibi(monkeypatch)
    with pytest.raises(ExportError, match="differ"):
        export(weights, model, None, tmp_path / "wrong")
