"""Laws of the exported tokenizer: AutoTokenizer, with no code of ours, gives our ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.hf.tokenizer import tokenizer_json, write_tokenizer
from mpt.tokenizer import EOD_PIECE, Tokenizer, load_tokenizer, train_tokenizer

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

    backend = Backend.from_str(json.dumps(tokenizer_json(load_tokenizer(tokenizer_file))))
    backend.encode_special_tokens = True
    for text in HARD_TEXTS:
        assert backend.encode(text).ids == ours.encode(text)


def test_the_files_are_a_function_of_the_tokenizer(tokenizer_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tokenizer(tokenizer_file, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
