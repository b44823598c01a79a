"""Laws of the exported tokenizer: AutoTokenizer, with no code of ours, gives our ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.hf.tokenizer import tokenizer_json, write_tokenizer
from mpt.tokenizer import (
    CONFIG_FILE,
    EOD_PIECE,
    JSON_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

transformers = pytest.importorskip("transformers")

HARD_TEXTS: list[str] = json.loads(
    (Path(__file__).parents[1] / "golden/hard_texts.json").read_text("utf-8")
)


@pytest.fixture(scope="module")
def ours(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="module")
def theirs(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return auto_tokenizer(tokenizer_file, tmp_path_factory.mktemp("exported"))


def auto_tokenizer(model_file: Path, directory: Path) -> Any:
    # The model type is what would lead AutoTokenizer to another class.
    (directory / "config.json").write_text('{"model_type": "mpt"}')
    write_tokenizer(model_file, directory)
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_auto_tokenizer_gives_our_ids_and_texts(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_auto_tokenizer_gives_our_ids_for_any_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert theirs(text)["input_ids"] == ours.encode(text)


@settings(max_examples=500, deadline=None)
@given(unit=st.text("ab -=\n\t", min_size=1, max_size=4), times=st.integers(1, 40))
def test_auto_tokenizer_gives_our_ids_where_pieces_overlap(
    ours: Tokenizer, theirs: Any, unit: str, times: int
) -> None:
    # "aaaa" and "abab" can be cut in several ways: the order of equal merges shows here.
    assert theirs(unit * times)["input_ids"] == ours.encode(unit * times)


def test_overlapping_pieces_agree_in_a_tokenizer_that_has_learned_only_such(
    tmp_path: Path,
) -> None:
    texts = ["".join("ab" if i & bit else "ba" for bit in (1, 2, 4, 8)) * 3 for i in range(16)]
    train_tokenizer([*texts, "a" * 99, "-" * 70, "aab" * 30], tmp_path / "t.model", vocab_size=330)
    ours, theirs = (
        load_tokenizer(tmp_path / "t.model"),
        auto_tokenizer(tmp_path / "t.model", tmp_path),
    )
    for number in range(2**12):
        text = f"{number:b}".translate({ord("0"): "a", ord("1"): "b"})
        assert theirs(text)["input_ids"] == ours.encode(text)


def test_a_batch_can_be_padded_and_comes_back(theirs: Any) -> None:
    batch = theirs(["a", "some longer text"], padding=True)
    assert len({len(ids) for ids in batch["input_ids"]}) == 1
    assert theirs.batch_decode(batch["input_ids"], skip_special_tokens=True) == [
        "a",
        "some longer text",
    ]


def test_special_tokens_have_the_same_ids_by_name(ours: Tokenizer, theirs: Any) -> None:
    assert theirs.eos_token == EOD_PIECE
    assert theirs.eos_token_id == ours.eod_id
    assert len(theirs) == ours.vocab_size


def test_the_tokenizer_survives_being_saved_by_transformers(
    ours: Tokenizer, theirs: Any, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in HARD_TEXTS:
        assert again(text)["input_ids"] == ours.encode(text)


def test_the_tokenizers_library_alone_agrees_when_told_to_read_special_tokens_as_text(
    tokenizer_file: Path, ours: Tokenizer
) -> None:
    from tokenizers import Tokenizer as Backend

    loaded = load_tokenizer(tokenizer_file)
    assert isinstance(loaded, SentencePieceTokenizer)
    backend = Backend.from_str(json.dumps(tokenizer_json(loaded)))
    backend.encode_special_tokens = True
    for text in HARD_TEXTS:
        assert backend.encode(text).ids == ours.encode(text)


def test_the_files_are_a_function_of_the_tokenizer(tokenizer_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tokenizer(tokenizer_file, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another program's tokenizer, which cuts texts off, fills them up and puts tokens around."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", EOD_PIECE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text("utf-8"), *HARD_TEXTS], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    directory = tmp_path_factory.mktemp("another")
    backend.save(str(directory / JSON_FILE))
    (directory / CONFIG_FILE).write_text(json.dumps({"eos_token": EOD_PIECE, "bos_token": "<s>"}))
    return directory / JSON_FILE


def test_auto_tokenizer_gives_our_ids_of_another_programs_tokenizer(
    byte_level_file: Path, tmp_path: Path
) -> None:
    ours, theirs = load_tokenizer(byte_level_file), auto_tokenizer(byte_level_file, tmp_path)
    for text in HARD_TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (EOD_PIECE, ours.eod_id)
    assert len(theirs) == ours.vocab_size


def test_an_export_of_another_programs_tokenizer_is_the_same_tokenizer(
    byte_level_file: Path, tmp_path: Path
) -> None:
    write_tokenizer(byte_level_file, tmp_path, max_length=77)
    again = load_tokenizer(tmp_path / JSON_FILE)
    assert again.sha256 == load_tokenizer(byte_level_file).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == [JSON_FILE, CONFIG_FILE]
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["model_max_length"] == 77
    (tmp_path / "twice").mkdir()
    write_tokenizer(tmp_path / JSON_FILE, tmp_path / "twice", max_length=77)
    for path in (tmp_path / "twice").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
