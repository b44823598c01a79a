"""Laws of the word memory: it gives the tokenizer's own ids, whatever it has seen before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.data import words
from mpt.data.encode import Encoder
from mpt.data.words import WordEncoder, cuts_at_spaces
from mpt.errors import DataError
from mpt.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer
from tests.data.cases import some_texts, write_tokenizer

PARTS = [
    " ",
    "  ",
    "\n",
    "\t",
    SPACE_MARK,
    "a",
    "alpha",
    "f(x):",
    "été",
    "🙂",
    "東京",
    "\x00",
    "x" * 40,
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.characters(codec="utf-8"), max_size=30).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.model"))


def plain(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [i for ids in tokenizer.encode_batch(texts) for i in [*ids, tokenizer.eod_id]]


@settings(max_examples=200, deadline=None)
@given(batches=st.lists(st.lists(TEXTS, max_size=4), max_size=4))
def test_words_give_the_ids_that_whole_texts_do(
    tokenizer: Tokenizer, batches: list[list[str]]
) -> None:
    encoder = WordEncoder(tokenizer, np.dtype("uint32"))
    for texts in batches:
        assert encoder.encode(texts).tolist() == plain(tokenizer, texts)


def test_what_is_forgotten_or_cut_changes_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "REMEMBERED_WORDS", 20)
    monkeypatch.setattr(words, "REMEMBERED_CHARACTERS", 3)
    monkeypatch.setattr(words, "UNITS_AT_A_TIME", 7)
    monkeypatch.setattr(words, "SLICE_CHARACTERS", 50)
    encoder = WordEncoder(tokenizer, np.dtype("uint16"))
    texts = some_texts(30)
    for _ in range(2):
        assert encoder.encode(texts).tolist() == plain(tokenizer, texts)
    assert len(encoder._memory) <= 20 + 7


def test_memory_holds_no_more_words_than_it_should(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "REMEMBERED_WORDS", 50)
    encoder = WordEncoder(tokenizer, np.dtype("uint16"))
    for start in range(0, 1000, 10):
        encoder.encode([f"w{number} " for number in range(start, start + 10)])
        assert len(encoder._memory) <= 50
    encoder.encode(["y" * 1000])
    assert "y" * 1000 not in encoder._memory


def test_a_tokenizer_whose_pieces_cross_spaces_encodes_whole_texts(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert cuts_at_spaces(tokenizer)
    import sentencepiece

    from mpt import tokenizer as module

    path = tmp_path / "crossing.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(some_texts(50)),
            model_writer=file,
            vocab_size=400,
            split_by_whitespace=False,
            **module._TRAINING,
        )
    crossing = load_tokenizer(path)
    assert not cuts_at_spaces(crossing)
    texts = some_texts(20, seed=1)
    found = Encoder(crossing, 0.0).encode([text.encode() for text in texts], ["train"])
    assert found["train"].tokens.tolist() == plain(crossing, texts)
    cut = WordEncoder(crossing, np.dtype("uint16")).encode(texts).tolist()
    assert cut != plain(crossing, texts)  # so the check of the pieces is needed


def test_a_word_too_long_for_the_memory_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "LIMIT_WORD_CHARACTERS", 100)
    encoder = WordEncoder(tokenizer, np.dtype("uint16"))
    encoder.encode(["y" * 100, "y " * 500])
    with pytest.raises(DataError, match="101 characters without a space, of 100 at most"):
        encoder.encode(["short", "y" * 101])
