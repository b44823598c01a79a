"""Laws of the GGUF export: what llama.cpp would compute from the file is what our network does."""

from __future__ import annotations

import json
import math
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpt import sentencepiece_file
from mpt.checkpoint.weights import Weights
from mpt.errors import CheckpointError, DataError, ExportError, UsageError
from mpt.hf import gguf_proof, prove
from mpt.hf.card import CARD_MARK
from mpt.hf.gguf import export_gguf
from mpt.hf.gguf_names import gguf_name, unsupported_by_gguf
from mpt.hf.gguf_read import ids_of
from mpt.hf.gguf_tokens import vocabulary
from mpt.hf.load import build_network
from mpt.model.network import MPT
from mpt.model.position import alibi_slopes
from mpt.recipe.layers import BlockOverrides, Order, Override
from mpt.recipe.model import Model
from mpt.tokenizer import load_tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf")

MakeWeights = Callable[[Model], Weights]

HARD_TEXTS: list[str] = json.loads(
    (Path(__file__).parents[1] / "golden/hard_texts.json").read_text("utf-8")
)
BASE = Model(d_model=48, n_heads=6, n_layers=2, max_seq_len=96, vocab_size=1100, clip_qkv=1.5)
SHAPES = {
    "released": BASE,
    "grouped": replace(BASE, kv_n_heads=2, act_fn="gelu_tanh"),
    "biased": replace(BASE, alibi=False, learned_pos_emb=True, no_bias=False, clip_qkv=None),
    "untied": replace(
        BASE,
        tie_word_embeddings=False,
        kv_n_heads=1,
        attention_bias=True,
        ffn_hidden_size=100,
        alibi_bias_max=16,
        norm_eps=1e-3,
    ),
    "no positions": replace(BASE, alibi=False, norm_type="layernorm"),
}


def content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return (
        {key: field.contents() for key, field in reader.fields.items()},
        {tensor.name: tensor for tensor in reader.tensors},
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_plain_forward_pass_over_the_file_gives_our_logits(
    tmp_path: Path, make_weights: MakeWeights, tokenizer_file: Path, shape: Model
) -> None:
    out = tmp_path / "model.gguf"
    done = export_gguf(
        make_weights(shape), shape, tokenizer_file, out, dtype="fp32", overwrite=False
    )
    assert isinstance(done.proof, gguf_proof.GgufProof)
    assert done.proof.max_difference < 1e-5
    assert (done.proof.n_blocks, done.proof.n_tokens) == (2, 2 * 96)
    tanh_is_ours = shape.act_fn == "gelu_tanh"
    assert (done.proof.tanh_gelu_difference < 1e-5) == tanh_is_ours
    assert any("tanh" in note for note in done.notes) != tanh_is_ours
    assert done.files == ("model.gguf",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_matrices_have_the_dtype_asked_for_and_all_else_is_fp32(
    tmp_path: Path, make_weights: MakeWeights, dtype: Any
) -> None:
    shape = SHAPES["biased"]
    weights = make_weights(shape)
    export_gguf(weights, shape, None, tmp_path / "m.gguf", dtype=dtype, overwrite=False)
    values, tensors = content(tmp_path / "m.gguf")
    assert values["general.file_type"] == {"fp32": 0, "fp16": 1, "bf16": 32}[dtype]
    for name, size in weights.shapes.items():
        stored = tensors[gguf_name(name)]
        matrix = len(size) == 2 and "wpe" not in name
        kind = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[dtype] if matrix else "F32"
        assert stored.tensor_type.name == kind
        assert tuple(reversed(stored.shape.tolist())) == size
        wanted = weights.read(name)
        wanted = wanted.to({"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16))
        assert stored.data.tobytes() == wanted.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tensors_have_the_names_that_the_gguf_package_knows_for_hugging_faces(
    shape: Model,
) -> None:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, shape.n_layers)
    for name in MPT(shape).state_dict():
        assert gguf_name(name) == known.get_name(name, try_suffixes=(".weight", ".bias"))


def test_the_file_says_what_the_model_is(tmp_path: Path, make_weights: MakeWeights) -> None:
    shape = SHAPES["untied"]
    export_gguf(
        make_weights(shape), shape, None, tmp_path / "m.gguf", dtype="fp32", overwrite=False
    )
    values, tensors = content(tmp_path / "m.gguf")
    said = {
        "general.architecture": "mpt",
        "mpt.context_length": 96,
        "mpt.embedding_length": 48,
        "mpt.block_count": 2,
        "mpt.feed_forward_length": 100,
        "mpt.attention.head_count": 6,
        "mpt.attention.head_count_kv": 1,
        "mpt.attention.clamp_kqv": 1.5,
        "mpt.attention.max_alibi_bias": 16.0,
        "mpt.vocab_size": 1100,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {key: values[key] for key in said} == said
    assert values["mpt.attention.layer_norm_epsilon"] == pytest.approx(1e-3)
    assert "output.weight" in tensors


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("n_heads", [1, 2, 3, 5, 6, 12, 16, 20, 40, 56, 64, 112])
def test_ggmls_slopes_are_mpts_for_any_number_of_heads(n_heads: int, bias_max: int) -> None:
    file = gguf_proof._File({"mpt.attention.max_alibi_bias": float(bias_max)}, lambda name: None)
    np.testing.assert_allclose(file.slopes(n_heads), alibi_slopes(n_heads, bias_max), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope": True, "alibi": False}, "rope"),
        ({"norm_type": "rmsnorm"}, "norm_type"),
        ({"norm_type": "low_precision_rmsnorm"}, "norm_type"),
        ({"ffn_type": "mptglu"}, "ffn_type"),
        ({"act_fn": "silu"}, "act_fn"),
        ({"head_dim": 16}, "head_dim"),
        ({"softmax_scale": 0.3}, "softmax_scale"),
        ({"qk_ln": True}, "qk_ln"),
        ({"qk_gn": True}, "qk_gn"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        ({"sliding_window_size": 32}, "sliding_window_size"),
        (
            {
                "block_overrides": BlockOverrides(
                    order=(Order(name="default"), Order(name="near")),
                    overrides={"near": Override(sliding_window_size=8)},
                )
            },
            "block_overrides",
        ),
    ],
)
def test_an_option_that_llama_cpp_cannot_compute_is_refused_by_name(
    change: dict[str, Any], said: str
) -> None:
    (reason,) = unsupported_by_gguf(replace(BASE, **change))
    assert reason.startswith(f"model.{said}: ")


def test_what_llama_cpp_computes_is_not_refused() -> None:
    for shape in SHAPES.values():
        assert unsupported_by_gguf(shape) == []
    trained = replace(BASE, attn_uses_sequence_id=True, attn_pdrop=0.1, embedding_fraction=0.1)
    plain = BlockOverrides(order=(Order(name="default", repeat=2),), overrides={})
    assert unsupported_by_gguf(replace(trained, block_overrides=plain)) == []
    same = replace(BASE, softmax_scale=1 / math.sqrt(8), logit_scale=1.0)
    assert unsupported_by_gguf(same) == []


def test_all_options_in_the_way_are_named_at_once(tmp_path: Path, weights: Weights) -> None:
    shape = replace(BASE, qk_gn=True, final_logit_softcapping=30.0)
    with pytest.raises(UsageError, match=r"(?s)model\.qk_gn.*model\.final_logit_softcapping"):
        export_gguf(weights, shape, None, tmp_path / "m.gguf", dtype="fp32", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_is_the_tokenizers_filled_up_to_the_rows_of_the_embedding(
    tmp_path: Path, make_weights: MakeWeights, tokenizer_file: Path
) -> None:
    export_gguf(
        make_weights(BASE), BASE, tokenizer_file, tmp_path / "m", dtype="bf16", overwrite=False
    )
    values, _ = content(tmp_path / "m/m.gguf")
    ours = load_tokenizer(tokenizer_file)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(values["tokenizer.ggml.scores"]) == 1100
    assert len(set(tokens)) == 1100
    for token in range(ours.vocab_size):
        match types[token]:
            case 1:  # normal
                assert tokens[token].replace("\u2581", " ").encode() == ours.token_bytes(token)
            case 6:  # byte
                assert f"<0x{ours.token_bytes(token)[0]:02X}>" == tokens[token]
            case kind:
                assert ours.token_bytes(token) == b""
                assert kind == {ours.eod_id: 3}.get(token, 2)  # control, or unknown
    assert set(types[ours.vocab_size :]) == {5}  # unused
    pieces = sentencepiece_file.parse(tokenizer_file.read_bytes()).pieces
    assert values["tokenizer.ggml.scores"][: len(pieces)] == [piece.score for piece in pieces]
    ids = [values[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "bos", "unknown")]
    assert ids == [0, 0, 1]
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"):
        assert values[f"tokenizer.ggml.{name}"] is False


def test_a_text_that_llama_cpp_would_read_as_a_byte_is_told(tmp_path: Path) -> None:
    train_tokenizer(["<0x41 the <0x41 cat <0x41 sat\n" * 9], tmp_path / "t.model", vocab_size=278)
    notes = vocabulary(tmp_path / "t.model", 278).notes
    assert any("'<0x41>'" in note for note in notes)
    assert sum("<0x" in note for note in notes) == 1


def test_a_tokenizer_with_more_ids_than_rows_is_refused(
    tmp_path: Path, make_weights: MakeWeights, tokenizer_file: Path
) -> None:
    small = replace(BASE, vocab_size=1000)
    with pytest.raises(DataError, match="1024 ids"):
        export_gguf(
            make_weights(small),
            small,
            tokenizer_file,
            tmp_path / "m.gguf",
            dtype="fp32",
            overwrite=False,
        )


def test_weights_that_do_not_fit_the_dtype_leave_no_file(
    tmp_path: Path, make_weights: MakeWeights
) -> None:
    weights = make_weights(BASE)
    path = next(iter(weights.pieces.values()))[0].file
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", 1e30)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not finite as torch\.float16"):
        export_gguf(weights, BASE, None, tmp_path / "m.gguf", dtype="fp16", overwrite=False)
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_file_that_is_not_what_was_meant_is_not_left_behind(
    tmp_path: Path, make_weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Any, tensor: np.ndarray) -> None:
        tensor = tensor.copy()
        tensor.flat[-1] += 1
        write(self, tensor)

    write = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", damaged)
    with pytest.raises(ExportError, match="was not written as it should be"):
        export_gguf(
            make_weights(BASE), BASE, None, tmp_path / "m.gguf", dtype="bf16", overwrite=False
        )
    assert not list(tmp_path.iterdir())


def test_metadata_that_is_not_what_was_meant_is_noticed(
    tmp_path: Path, make_weights: MakeWeights
) -> None:
    path = tmp_path / "m.gguf"
    weights = make_weights(BASE)
    export_gguf(weights, BASE, None, path, dtype="fp32", overwrite=False)
    values, _ = content(path)
    said = {key: value for key, value in values.items() if not key.startswith("GGUF.")}
    names = {gguf_name(name): name for name in weights.shapes}
    gguf_proof.prove(gguf, path, said, names, weights.read, BASE, None)
    for wrong in (said | {"mpt.block_count": 3}, said | {"mpt.x": 1}, dict(list(said.items())[1:])):
        with pytest.raises(ExportError, match="its metadata was not written"):
            gguf_proof.prove(gguf, path, wrong, names, weights.read, BASE, None)


def test_a_model_that_llama_cpp_would_compute_otherwise_does_not_pass_the_proof(
    tmp_path: Path, make_weights: MakeWeights
) -> None:
    """What `unsupported_by_gguf` refuses is refused for a reason: the logits are others."""
    path, weights = tmp_path / "m.gguf", make_weights(BASE)
    export_gguf(weights, BASE, None, path, dtype="fp32", overwrite=False)
    said = {key: value for key, value in content(path)[0].items() if not key.startswith("GGUF.")}
    names = {gguf_name(name): name for name in weights.shapes}
    for change in ({"softmax_scale": 0.3}, {"final_logit_softcapping": 3.0}, {"act_fn": "silu"}):
        with pytest.raises(ExportError, match="differ from ours"):
            gguf_proof.prove(gguf, path, said, names, weights.read, replace(BASE, **change), None)


def test_what_a_file_continues_with_and_the_ids_it_gives_to_texts_are_proved(
    tmp_path: Path, make_weights: MakeWeights, tokenizer_file: Path
) -> None:
    path, weights = tmp_path / "m.gguf", make_weights(BASE)
    done = export_gguf(weights, BASE, tokenizer_file, path, dtype="fp32", overwrite=False)
    assert isinstance(done.proof, gguf_proof.GgufProof)
    assert done.proof.n_greedy == 16
    assert done.proof.n_texts == len(prove.HARD_TEXTS) - 1  # one has a mark that is read as a space
    said = {key: value for key, value in content(path)[0].items() if not key.startswith("GGUF.")}
    names = {gguf_name(name): name for name in weights.shapes}
    other = load_tokenizer(byte_level(tmp_path))
    with pytest.raises(ExportError, match="its vocabulary gives other ids"):
        gguf_proof.prove(gguf, path, said, names, weights.read, BASE, other)


def test_a_vocabulary_alone_gives_the_ids_of_the_tokenizer(
    tmp_path: Path, make_weights: MakeWeights, tokenizer_file: Path
) -> None:
    for file in (tokenizer_file, byte_level(tmp_path)):
        out = tmp_path / f"m{file.suffix}.gguf"
        export_gguf(make_weights(BASE), BASE, file, out, dtype="fp16", overwrite=False)
        values, ours = content(out)[0], load_tokenizer(file)
        by_pieces = values["tokenizer.ggml.model"] == "llama"
        mine = [text for text in HARD_TEXTS if not (by_pieces and "\u2581" in text)]
        assert len(mine) > 200
        assert [ids_of(values, text) for text in mine] == [ours.encode(text) for text in mine]
        key = "tokenizer.ggml.scores" if by_pieces else "tokenizer.ggml.merges"
        changed = values | {key: values[key][::-1]}
        assert any(ids_of(changed, text) != ours.encode(text) for text in mine)


def test_a_large_model_is_compared_by_its_first_blocks(
    tmp_path: Path, make_weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = replace(BASE, n_layers=5)
    monkeypatch.setattr(gguf_proof, "_PROOF_BYTES", 1000)
    done = export_gguf(
        make_weights(deep), deep, None, tmp_path / "m.gguf", dtype="fp32", overwrite=False
    )
    assert isinstance(done.proof, gguf_proof.GgufProof)
    assert (done.proof.n_blocks, done.proof.n_tensors) == (2, 2 + 5 * 6)
    assert "2 blocks" in str(done.proof)


MEASURE = """
import struct, sys
from pathlib import Path
from mpt.checkpoint.weights import gather, pieces_in
from mpt.hf import gguf_proof, prove
from mpt.hf.gguf import export_gguf
from mpt.hf.names import shapes_of
from mpt.recipe.model import Model

def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

gguf_proof._PROOF_BYTES = 0
def export(n_layers):
    model = Model(d_model=384, n_heads=8, n_layers=n_layers, max_seq_len=16, vocab_size=512)
    header, at = {}, 0
    for name, shape in shapes_of(model).items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    import json
    text = json.dumps(header).encode()
    path = Path(sys.argv[1], f"{n_layers}.safetensors")
    with path.open("wb") as file:  # sparse: all zeros
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    weights = gather(path.parent, ((piece.key, piece) for piece in pieces_in(path)))
    export_gguf(weights, model, None, path.with_suffix(".gguf"), dtype="fp16", overwrite=False)
    return at / 2**20

export(2)
before = peak()
size = export(18)
print(size, peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    size_mib, growth_mib = map(float, done.stdout.split())
    assert size_mib > 120
    assert growth_mib < 20


def test_a_directory_gets_the_file_and_the_card_and_can_be_overwritten(
    tmp_path: Path, make_weights: MakeWeights
) -> None:
    out, weights = tmp_path / "tiny", make_weights(BASE)

    def card(proof: str) -> str:
        return f"{CARD_MARK}\n{proof}\n"

    done = export_gguf(weights, BASE, None, out, dtype="fp16", overwrite=False, card=card)
    assert done.directory == out
    assert done.files == ("tiny.gguf", "README.md")
    assert done.bytes == sum(path.stat().st_size for path in out.iterdir())
    assert (out / "README.md").read_text() == card(str(done.proof))
    with pytest.raises(UsageError, match="is there already"):
        export_gguf(weights, BASE, None, out, dtype="fp16", overwrite=False, card=card)
    export_gguf(weights, BASE, None, out, dtype="fp32", overwrite=True, card=card)
    assert content(out / "tiny.gguf")[0]["general.file_type"] == 0


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "tiny.gguf"])
def test_what_is_of_no_export_is_never_replaced(
    tmp_path: Path, make_weights: MakeWeights, name: str
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / name).write_text("mine")
    places = [tmp_path / "tiny"] + [tmp_path / "tiny" / name] * name.endswith(".gguf")
    for out in places:
        with pytest.raises(UsageError, match="is of no such export"):
            export_gguf(make_weights(BASE), BASE, None, out, dtype="fp32", overwrite=True)
    assert (tmp_path / "tiny" / name).read_text() == "mine"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_llama_cpp_itself_gives_our_logits(
    tmp_path: Path, make_weights: MakeWeights, tokenizer_file: Path, shape: Model
) -> None:
    """Its gelu goes through a table of fp16: of logits around 3, 2e-3 is what that makes."""
    llama_cpp = pytest.importorskip("llama_cpp")
    weights = make_weights(shape)
    export_gguf(weights, shape, tokenizer_file, tmp_path / "m", dtype="fp32", overwrite=False)
    theirs = llama_cpp.Llama(
        str(tmp_path / "m/m.gguf"),
        n_ctx=96,
        logits_all=True,
        n_threads=1,
        verbose=False,
        type_k=0,  # keys and values in fp32
        type_v=0,
    )
    tokens = random.Random(0).choices(range(1024), k=96)
    theirs.eval(tokens)
    with torch.inference_mode():
        ours = build_network(shape, weights.read)(torch.tensor([tokens]))[0]
    np.testing.assert_allclose(theirs.scores[:96], ours, atol=1e-2)
    greedy = ours.argmax(-1).numpy()
    assert (theirs.scores[:96].argmax(-1) == greedy).mean() > 0.95
    theirs.close()


def test_llama_cpp_itself_reads_texts_as_our_tokenizer_does(
    tmp_path: Path, make_weights: MakeWeights, tokenizer_file: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    export_gguf(
        make_weights(BASE), BASE, tokenizer_file, tmp_path / "m", dtype="fp32", overwrite=False
    )
    theirs = llama_cpp.Llama(str(tmp_path / "m/m.gguf"), vocab_only=True, verbose=False)
    ours = load_tokenizer(tokenizer_file)
    for text in HARD_TEXTS:
        ids = ours.encode(text)
        if "\u2581" not in text:  # which it reads as a space, and a note says so
            assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert theirs.detokenize(ids) == text.encode()
    assert theirs.token_eos() == ours.eod_id
    theirs.close()


def byte_level(directory: Path, other: str = "<|other|>", **cut: Any) -> Path:
    """Write a byte-level tokenizer as another program would have trained it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **cut)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", other],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text.replace("<|", "<") for text in (Path(__file__).read_text("utf-8"), *HARD_TEXTS)]
    backend.train_from_iterator(texts, trainer)
    backend.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def test_a_byte_level_tokenizer_becomes_a_vocabulary_with_merges(
    tmp_path: Path, make_weights: MakeWeights
) -> None:
    path = byte_level(tmp_path)
    out = tmp_path / "m.gguf"
    export_gguf(make_weights(BASE), BASE, path, out, dtype="bf16", overwrite=False)
    values, _ = content(out)
    source = json.loads(path.read_text("utf-8"))
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.tokens"][:1000] == sorted(
        source["model"]["vocab"], key=source["model"]["vocab"].__getitem__
    )
    assert [*map(str.split, values["tokenizer.ggml.merges"])] == source["model"]["merges"]
    assert values["tokenizer.ggml.token_type"] == [3, 3, *[1] * 998, *[5] * 100]
    assert values["tokenizer.ggml.eos_token_id"] == 0


def test_an_unused_row_takes_no_name_that_a_token_has(tmp_path: Path) -> None:
    tokens = vocabulary(byte_level(tmp_path, "[PAD0]"), 1010).tokens
    assert tokens[1] == "[PAD0]"
    assert len(set(tokens)) == len(tokens) == 1010


def test_a_byte_level_tokenizer_that_cuts_text_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="that cut text as GPT-2 does"):
        vocabulary(byte_level(tmp_path, use_regex=False), 1100)


def test_llama_cpp_itself_reads_texts_as_a_byte_level_tokenizer_does(
    tmp_path: Path, make_weights: MakeWeights
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path, out = byte_level(tmp_path), tmp_path / "m.gguf"
    export_gguf(make_weights(BASE), BASE, path, out, dtype="fp32", overwrite=False)
    theirs = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
    ours = load_tokenizer(path)
    for text in HARD_TEXTS:
        ids = ours.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids, text
        if max(map(len, map(ours.token_bytes, ids)), default=0) < 32:  # its Python binding's room
            assert theirs.detokenize(ids) == text.encode()
    theirs.close()
