"""Laws of the export: transformers computes our logits, or there is no export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpt.checkpoint.weights import Weights
from mpt.errors import CheckpointError, DataError, UsageError
from mpt.generate.loop import Options, generate
from mpt.generate.sample import Sampling
from mpt.hf.export import Dtype, export
from mpt.hf.load import build_network, load_exported
from mpt.hf.prove import Proof
from mpt.recipe.model import Model
from mpt.recipe.rope import RopeScaling
from mpt.tokenizer import train_tokenizer

from .test_hf_config import LLAMA

transformers = pytest.importorskip("transformers")

ALL_FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def exported(
    weights: Weights,
    model: Model,
    tokenizer_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    assert export(weights, model, tokenizer_file, out).proved
    return out


def in_transformers(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32
    ).eval()


STRETCHED = RopeScaling(
    type="llama3", factor=8.0, high_freq_factor=3.0, original_max_position_embeddings=24
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_n_heads": None, "tie_word_embeddings": True, "norm_eps": 0.1, "act_fn": "gelu_tanh"},
        {"kv_n_heads": 1, "no_bias": False, "norm_type": "low_precision_rmsnorm", "act_fn": "mish"},
        {"head_dim": 10, "rope_theta": 300.0, "act_fn": "gelu", "ffn_hidden_size": 50},
        {"rope_hf_config": RopeScaling(type="linear", factor=3.0), "act_fn": "relu"},
        {"rope_hf_config": STRETCHED, "act_fn": "tanh"},
        # Beyond max_seq_len, where the base grows.
        {"rope_hf_config": RopeScaling(type="dynamic", factor=3.0), "max_seq_len": 40},
    ],
)
def test_a_model_of_llamas_shape_is_llama_in_transformers(
    make_weights: Callable[[Model], Weights], tmp_path: Path, change: dict[str, Any]
) -> None:
    model = replace(LLAMA, **change)
    weights = make_weights(model)
    assert export(weights, model, None, tmp_path / "out").proved
    tokens = torch.randint(model.vocab_size, (2, 96))
    theirs = in_transformers(tmp_path / "out")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.inference_mode():
        logits = theirs(tokens).logits
        torch.testing.assert_close(
            build_network(model, weights.read)(tokens), logits, atol=1e-4, rtol=0
        )
    assert logits.std() > 0.1


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"clip_qkv": None, "softmax_scale": None},
        {"n_heads": 8},
        {"n_heads": 1},
        {"n_heads": 3, "n_layers": 1},
        {"max_seq_len": 600},
        {"tie_word_embeddings": False, "norm_eps": 0.1, "norm_type": "layernorm"},
    ],
)
def test_transformers_computes_our_logits(
    make_weights: Callable[[Model], Weights], model: Model, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = replace(model, **change)
    export(make_weights(model), model, None, tmp_path / "out")
    tokens = torch.randint(model.vocab_size, (2, model.max_seq_len))
    with torch.inference_mode():
        theirs = in_transformers(tmp_path / "out")(tokens).logits
        tensors = load_file(tmp_path / "out/model.safetensors")
        ours = build_network(model, tensors.__getitem__)(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1  # else equal logits would prove little


def test_the_exported_directory_runs_here_as_it_does_in_transformers(
    exported: Path, weights: Weights
) -> None:
    loaded = load_exported(exported)
    for name, tensor in loaded.network.state_dict().items():
        assert torch.equal(tensor, weights.read(name))
    prompt = loaded.tokenizer.encode("def main(")
    options = Options(tokens=40, context=96, sampling=Sampling(temperature=0))
    here = [token for _, token in generate(loaded.network, [prompt], options)]
    there = in_transformers(exported).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=40,
        do_sample=False,
    )
    assert there[0, len(prompt) :].tolist() == here
    assert len(set(here)) > 9  # no loop that anything would get right


def test_an_export_is_what_the_hub_expects_and_nothing_else(exported: Path) -> None:
    assert left_behind(exported) == ALL_FILES
    assert left_behind(exported.parent) == ["out"]
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "mpt"
    assert "auto_map" not in config  # no code travels with it
    assert config["eos_token_id"] == 0


def test_a_sharded_export_equals_a_single_file(
    exported: Path, weights: Weights, model: Model, tmp_path: Path
) -> None:
    result = export(weights, model, None, tmp_path / "out", shard_bytes=100_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    whole = load_file(exported / "model.safetensors")
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(files) < set(result.files)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], whole[name])


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_rounded_export_is_proved_against_rounded_weights(
    weights: Weights, model: Model, tmp_path: Path, dtype: Dtype, torch_dtype: str
) -> None:
    result = export(weights, model, None, tmp_path / "out", dtype=dtype)
    assert isinstance(result.proof, Proof)
    assert result.proof.max_difference < 1e-4
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert tensor.dtype == getattr(torch, torch_dtype)
        assert torch.equal(tensor, weights.read(name).to(tensor.dtype))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == torch_dtype


def test_an_export_is_a_function_of_the_checkpoint(
    exported: Path, weights: Weights, model: Model, tokenizer_file: Path, tmp_path: Path
) -> None:
    export(weights, model, tokenizer_file, tmp_path / "out")
    for path in exported.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_changes_on_the_way_is_said(weights: Weights, model: Model, tmp_path: Path) -> None:
    result = export(weights, model, None, tmp_path / "out")
    assert [note.split(" is ")[0] for note in result.notes[:1]] == ["attn_pdrop 0.3"]
    assert "no tokenizer" in result.notes[1]
    model = replace(model, attn_pdrop=0.0, attn_uses_sequence_id=True)
    result = export(weights, model, None, tmp_path / "again")
    assert "each text is a document by itself" in result.notes[0]


def test_an_export_has_a_card_that_says_what_was_proved(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "logits of 192 tokens differ by" in card
    assert "the 32 tokens it generates greedily are the likeliest here too" in card


def test_a_taken_directory_is_refused_unless_it_is_an_export_to_overwrite(
    weights: Weights, model: Model, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(weights, model, None, out)  # empty: nothing is lost
    with pytest.raises(UsageError, match="is there already"):
        export(weights, model, None, out)
    export(weights, model, None, out, dtype="bf16", overwrite=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    (out / "README.md").write_text("my model card")  # no longer the one that was written
    with pytest.raises(UsageError, match=r"README.md"):
        export(weights, model, None, out, overwrite=True)
    assert (out / "README.md").read_text() == "my model card"
    assert left_behind(tmp_path) == ["out"]


def test_what_a_killed_export_left_behind_is_not_in_the_way(
    weights: Weights, model: Model, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/model-00001-of-00009.safetensors").write_bytes(b"half")
    result = export(weights, model, None, tmp_path / "out")
    assert result.files == tuple(ALL_FILES[:4])
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize("change", [{"vocab_size": 1101}, {"n_layers": 1}, {"n_layers": 10**9}])
def test_weights_of_another_model_are_refused(
    weights: Weights, model: Model, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"not the weights of this model|fewer tensors"):
        export(weights, replace(model, **change), None, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_tokenizer_larger_than_the_model_is_refused(
    weights: Weights, model: Model, tmp_path: Path
) -> None:
    texts = [f"{i} {i * 7919} " * 20 for i in range(3000)]
    train_tokenizer(texts, tmp_path / "large.model", vocab_size=1200)
    with pytest.raises(DataError, match="has 1200 ids, and the model only 1100"):
        export(weights, model, tmp_path / "large.model", tmp_path / "out")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "fp32"), (1e30, "fp16")])
def test_weights_that_are_not_finite_are_refused(
    make_weights: Callable[[Model], Weights],
    model: Model,
    tmp_path: Path,
    value: float,
    dtype: Dtype,
) -> None:
    weights = make_weights(model)
    path = weights.directory / "weights.safetensors"
    tensors = load_file(path)
    tensors["transformer.norm_f.weight"][3] = value
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"norm_f.weight is not finite"):
        export(weights, model, None, tmp_path / "out", dtype=dtype)
    assert left_behind(tmp_path) == []


def test_a_damaged_exported_directory_is_refused(
    weights: Weights, model: Model, tokenizer_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(weights, model, tokenizer_file, out, shard_bytes=100_000)
    first = sorted(out.glob("model-*.safetensors"))[0]
    tensors = first.read_bytes()
    first.write_bytes(tensors[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_exported(out)
    first.unlink()
    with pytest.raises(CheckpointError, match="names 'model-00001-of-00004"):
        load_exported(out)
    index = (out / "model.safetensors.index.json").read_bytes()
    (out / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_exported(out)
    (out / "model.safetensors.index.json").write_bytes(index)
    first.write_bytes(tensors)
    (out / "model-again.safetensors").write_bytes(tensors)
    with pytest.raises(CheckpointError, match="is also in"):
        load_exported(out)
    (out / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a mapping"):
        load_exported(out)
