"""Laws of the import: what came in goes out as the same bytes, and nothing hostile comes in."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpt.checkpoint.layout import model_of, read_manifest, verify_all
from mpt.checkpoint.tensors import read_tensors
from mpt.checkpoint.weights import open_weights
from mpt.errors import CheckpointError, DataError, UsageError
from mpt.hf.config import config_json
from mpt.hf.export import export
from mpt.hf.importing import import_directory
from mpt.hf.load import build_network
from mpt.hf.source import open_checkpoint, open_source
from mpt.model.network import MPT
from mpt.recipe.model import Model
from mpt.tokenizer import train_tokenizer

from .conftest import MakeWeights
from .test_hf_config import LLAMA

transformers = pytest.importorskip("transformers")

Tensors = dict[str, torch.Tensor]


def tensors_in(directory: Path) -> Tensors:
    return {k: t for path in directory.glob("*.safetensors") for k, t in load_file(path).items()}


def same_bytes(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def made_by_transformers(directory: Path, model: Model, **how: Any) -> None:
    """Let transformers itself write a model of random weights, gains included."""
    config = config_json(model, dtype="float32", eod_id=None)
    torch.manual_seed(3)
    kind = config.pop("architectures")[0].replace("ForCausalLM", "")
    made = getattr(transformers, f"{kind}Config")(**config)
    network = getattr(transformers, f"{kind}ForCausalLM")(made)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.to(how.pop("dtype", torch.float32)).save_pretrained(directory, **how)


@pytest.fixture(params=["mpt", "llama"])
def shape(request: pytest.FixtureRequest, model: Model) -> Model:
    return model if request.param == "mpt" else LLAMA


@pytest.fixture
def exported(model: Model, tokenizer_file: Path, make_weights: MakeWeights, tmp_path: Path) -> Path:
    export(make_weights(model), model, tokenizer_file, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["100KB", "5GB"])
def test_import_then_export_is_the_identity(
    shape: Model, dtype: torch.dtype, shard_size: str, tmp_path: Path
) -> None:
    made_by_transformers(tmp_path / "hf", shape, dtype=dtype, max_shard_size=shard_size)
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == (shard_size == "100KB")
    done = import_directory(tmp_path / "hf", tmp_path / "ours", shard_bytes=90_000)
    assert len(read_manifest(tmp_path / "ours").names("weights")) > 1
    assert verify_all(tmp_path / "ours") == {tmp_path / "ours": []}
    opened = open_checkpoint(tmp_path / "ours")
    assert opened.model == done.model
    export(opened.weights, opened.model, None, tmp_path / "again", shard_bytes=80_000)
    assert same_bytes(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "hf"))
    before, after = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "again")
    )
    assert before["dtype"] == after["dtype"] == str(dtype).removeprefix("torch.")


def test_an_import_computes_what_transformers_does(shape: Model, tmp_path: Path) -> None:
    made_by_transformers(tmp_path / "hf", shape)
    import_directory(tmp_path / "hf", tmp_path / "ours")
    opened = open_checkpoint(tmp_path / "ours")
    tokens = torch.randint(shape.vocab_size, (2, 64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        logits = theirs(tokens).logits
        ours = build_network(opened.model, opened.weights.read)(tokens)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-5)
    assert logits.std() > 0.1


def test_a_run_can_begin_with_an_import_whatever_it_is_stored_as(
    shape: Model, tmp_path: Path
) -> None:
    made_by_transformers(tmp_path / "hf", shape, dtype=torch.bfloat16)
    import_directory(tmp_path / "hf", tmp_path / "ours", shard_bytes=90_000)
    wanted = open_weights(tmp_path / "ours")
    masters = {name: torch.empty(t.shape) for name, t in MPT(shape).state_dict().items()}
    with pytest.warns(UserWarning, match="single process"):
        read_tensors(masters, tmp_path / "ours")
    for name, tensor in masters.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted.read(name).float())


def test_an_import_is_a_checkpoint_of_step_0_with_its_tokenizer(
    exported: Path, model: Model, tokenizer_file: Path, tmp_path: Path
) -> None:
    done = import_directory(exported, tmp_path / "ours")
    assert done.files == (
        "manifest.json",
        "source.json",
        "tokenizer.model",
        "weights-00001-of-00001.safetensors",
    )
    manifest = read_manifest(tmp_path / "ours")
    assert (manifest.step, manifest.world_size, manifest.names("optimizer")) == (0, 1, [])
    assert model_of(tmp_path / "ours", manifest) == replace(model, attn_pdrop=0.0)
    assert (tmp_path / "ours/tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    loaded = open_source(tmp_path / "ours")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("a  b\n")) == "a  b\n"
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "ours"}


def test_of_two_tokenizers_the_usable_one_is_taken(exported: Path, tmp_path: Path) -> None:
    (exported / "tokenizer.model").write_bytes(b"not one")
    done = import_directory(exported, tmp_path / "ours")
    assert {"tokenizer.json", "tokenizer_config.json"} < set(done.files)
    (exported / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="take the tokenizer out") as caught:
        import_directory(exported, tmp_path / "other")
    assert all(name in str(caught.value) for name in ("tokenizer.model", "tokenizer.json"))


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(exported: Path, tmp_path: Path) -> None:
    texts = [f"{i} {i * 7919} " * 20 for i in range(3000)]
    train_tokenizer(texts, exported / "tokenizer.model", vocab_size=1200)
    (exported / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has 1200 ids, and the model only 1100"):
        import_directory(exported, tmp_path / "ours")


def test_a_checkpoint_that_says_to_be_of_another_model_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    import_directory(exported, tmp_path / "ours")
    manifest = read_manifest(tmp_path / "ours")
    other = replace(manifest, model=manifest.model | {"ffn_hidden_size": 100})
    (tmp_path / "ours/manifest.json").write_text(other.to_json())
    with pytest.raises(CheckpointError, match=r"up_proj.weight has shape \(192, 48\), not \(100"):
        open_checkpoint(tmp_path / "ours")


def test_a_taken_name_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("hf", "file"):
        with pytest.raises(UsageError, match="is there already"):
            import_directory(exported, tmp_path / name)
    with pytest.raises(UsageError, match="is what a run calls its step 7"):
        import_directory(exported, tmp_path / "step-00000007")
    partial = tmp_path / "ours.partial"
    partial.mkdir()
    (partial / "weights-00001-of-00002.safetensors").write_bytes(b"half")
    (partial / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"mine.txt"):
        import_directory(exported, tmp_path / "ours")
    (partial / "mine.txt").unlink()  # what a killed import leaves is not in the way
    import_directory(exported, tmp_path / "ours")
    assert not partial.exists()


def test_an_import_that_fails_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpt.checkpoint.imported.atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        import_directory(exported, tmp_path / "ours")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_and_never_opened(exported: Path, tmp_path: Path, name: str) -> None:
    (exported / "model.safetensors").unlink()
    os.mkfifo(exported / name)  # opening it would block for ever
    with pytest.raises(CheckpointError, match=f"{name}: a pickle can run any program"):
        import_directory(exported, tmp_path / "ours")


def test_an_index_leads_nowhere(exported: Path, tmp_path: Path) -> None:
    (exported / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weights there"):
        import_directory(exported, tmp_path / "ours")
    save_file({"x": torch.zeros(1)}, exported / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere\.safetensors', which"):
        import_directory(exported, tmp_path / "ours")
    # A cache of the hub is made of links, and they are followed.
    (exported / "model.safetensors.index.json").unlink()
    (exported / "model-00001-of-00001.safetensors").unlink()
    (exported / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    import_directory(exported, tmp_path / "ours")


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extra": torch.zeros(2)}, "extra is not the model's"),
        ({"extra": torch.zeros(())}, "extra is not the model's"),
        ({"model.norm.weight": None}, r"model.norm.weight is missing"),
        (
            {"model.layers.1.self_attn.k_proj.weight": torch.zeros(17, 48)},
            r"model.layers.1.self_attn.k_proj.weight has shape \(17, 48\), not \(16, 48\)",
        ),
        (
            {"model.norm.weight": torch.zeros(48, dtype=torch.int8)},
            "model.norm.weight is stored as I8",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.zeros(48, 48, dtype=torch.bfloat16)},
            "must be of one of F32, BF16, F16",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_named_as_they_are_there(
    make_weights: MakeWeights, tmp_path: Path, changes: dict[str, torch.Tensor | None], said: str
) -> None:
    export(make_weights(LLAMA), LLAMA, None, tmp_path / "hf")
    change_tensors(tmp_path / "hf", **changes)
    with pytest.raises(CheckpointError, match=said):
        import_directory(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**9},
        {"d_model": 10**30, "n_heads": 1},
        {"d_model": 10**12, "n_heads": 1, "vocab_size": 10**12},
    ],
)
def test_a_config_of_any_size_costs_nothing(
    exported: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=r"fewer tensors|of such a size|has shape"):
        import_directory(exported, tmp_path / "ours")


def test_what_old_versions_wrote_besides_is_left_out_if_it_says_nothing_new(
    make_weights: MakeWeights, tmp_path: Path
) -> None:
    tied = replace(LLAMA, tie_word_embeddings=True)
    export(make_weights(tied), tied, None, tmp_path / "hf")
    before = tensors_in(tmp_path / "hf")
    head = before["model.embed_tokens.weight"].clone()
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    change_tensors(tmp_path / "hf", **{"lm_head.weight": head}, **frequencies)
    done = import_directory(tmp_path / "hf", tmp_path / "ours")
    assert "lm_head.weight and 2 like it follows from the rest" in done.notes[0]
    opened = open_checkpoint(tmp_path / "ours")
    export(opened.weights, opened.model, None, tmp_path / "again")
    assert same_bytes(tensors_in(tmp_path / "again"), before)
    head[-1, -1] += 1
    change_tensors(tmp_path / "hf", **{"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the embedding"):
        import_directory(tmp_path / "hf", tmp_path / "other")


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config.json"):
        import_directory(tmp_path, tmp_path / "ours")
