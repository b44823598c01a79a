"""Laws of the tokenizer: no text is lost, no text becomes a special id, files are whole."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt import sentencepiece_file
from mpt.errors import DataError
from mpt.tokenizer import EOD_PIECE, Tokenizer, _even_sample, load_tokenizer, train_tokenizer

HARD_TEXTS: list[str] = json.loads(
    (Path(__file__).parent / "golden/hard_texts.json").read_text("utf-8")
)
PROSE = ["the cat sat on the mat, and the dog sat on the cat\n" * 9]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(standard_library(), path, vocab_size=1024)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file: Path) -> Tokenizer:
    return load_tokenizer(model_file)


def standard_library(n_files: int = 40) -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text("utf-8") for path in sorted(folder.glob("*.py"))[:n_files]]


def stranger(path: Path, **options: Any) -> Path:
    """Write a model as a stranger may have trained it: mpt's own options, except for some."""
    model = io.BytesIO()
    harmless: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "vocab_size": 300,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_writer=model, **(harmless | options)
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_back_as_they_were(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_text_comes_back_as_it_was(tokenizer: Tokenizer) -> None:
    text = "\n".join(HARD_TEXTS) * 100 + "a" * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=st.text(st.sampled_from(f"{EOD_PIECE}<unk0xA>/s ")))
def test_no_text_becomes_a_special_id(tokenizer: Tokenizer, text: str) -> None:
    for spelled in (text, EOD_PIECE + text):
        assert all(tokenizer.token_bytes(token) for token in tokenizer.encode(spelled))


def test_a_batch_is_each_text_by_itself(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(HARD_TEXTS) == [tokenizer.encode(text) for text in HARD_TEXTS]


def test_special_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert tokenizer.decode([*ids, tokenizer.eod_id, *ids]) == "éé"


def test_ids_that_spell_no_character_decode_to_a_replacement(tokenizer: Tokenizer) -> None:
    half_a_face = tokenizer.encode("\U0001f600")[:2]
    assert tokenizer.decode(half_a_face) == "\ufffd"


@pytest.mark.parametrize("token", [-1, 1024, 2**70])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(DataError, match="not within the tokenizer's 1024"):
        tokenizer.decode([token])


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lone surrogate, U\+D800, at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="lone surrogate"):
        train_tokenizer(["ab\ud800"], tmp_path / "tokenizer.model", vocab_size=300)


def test_indentation_and_line_ends_are_pieces(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("        ") == [tokenizer.encode("        ")[0]]
    assert len(tokenizer.encode("):\n")) == 1
    held_out = standard_library(60)[40:]
    n_tokens = sum(map(len, tokenizer.encode_batch(held_out)))
    assert sum(len(text.encode()) for text in held_out) / n_tokens > 2.5


def test_training_is_a_function_of_texts_and_size(model_file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.model"
    train_tokenizer(iter(standard_library()), again, vocab_size=1024)
    assert again.read_bytes() == model_file.read_bytes()
    assert load_tokenizer(again).sha256 == load_tokenizer(model_file).sha256


def test_more_text_than_the_trainer_can_hold_is_sampled_evenly_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks = [f"{i:010d}" for i in range(20_000)]
    assert _even_sample(iter(chunks)) == chunks
    monkeypatch.setattr("mpt.tokenizer._SAMPLE", 20_000)
    sample = _even_sample(iter(chunks))
    assert 10_000 <= sum(map(len, sample)) <= 20_000
    assert sample == sorted(sample)
    tenths = Counter(int(chunk) // 2_000 for chunk in sample)
    assert min(tenths[i] for i in range(10)) > 0.5 * len(sample) / 10


def test_marks_that_sentencepiece_keeps_for_itself_do_not_cost_their_sentence(
    tmp_path: Path,
) -> None:
    train_tokenizer(["\u2585 hello \u2581 hello\n" * 9], tmp_path / "t.model", vocab_size=280)
    assert len(load_tokenizer(tmp_path / "t.model").encode(" hello")) == 1


@pytest.mark.parametrize("vocab_size", [259, 4096])
def test_a_size_that_cannot_be_is_refused_with_one_that_can(
    tmp_path: Path, vocab_size: int
) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(DataError, match=r"ask for \d+ or") as refused:
        train_tokenizer(PROSE, path, vocab_size=vocab_size)
    possible = int(re.findall(r"ask for (\d+) or", str(refused.value))[0])
    train_tokenizer(PROSE, path, vocab_size=possible)
    assert load_tokenizer(path).vocab_size == possible


def test_a_size_without_room_for_every_byte_and_no_text_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="use 258 plus room"):
        train_tokenizer(PROSE, tmp_path / "tokenizer.model", vocab_size=257)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", ""], tmp_path / "tokenizer.model", vocab_size=300)


def test_a_failed_training_leaves_the_old_file_alone(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file.read_bytes())
    with pytest.raises(DataError):
        train_tokenizer(PROSE, path, vocab_size=4096)
    assert path.read_bytes() == model_file.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram"}, "model_type is unigram, not bpe"),
        ({"byte_fallback": False}, "byte_fallback is off"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization changes characters"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"user_defined_symbols": ["cat"]}, "user_defined_symbols"),
        ({"eos_id": -1}, "no end-of-document token"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused_by_option(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    path = stranger(tmp_path / "stranger.model", **options)
    with pytest.raises(DataError, match=said) as refused:
        load_tokenizer(path)
    assert "; " not in str(refused.value).replace("(eos_id; ", "")  # that option, and no other


def test_a_strangers_tokenizer_that_loses_nothing_is_taken(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(stranger(tmp_path / "stranger.model"))
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_reason_is_named_at_once(tmp_path: Path) -> None:
    path = stranger(tmp_path / "s.model", byte_fallback=False, add_dummy_prefix=True)
    with pytest.raises(DataError, match=r"byte_fallback is off.*; add_dummy_prefix"):
        load_tokenizer(path)


def test_a_byte_that_is_missing_among_the_pieces_is_noticed(
    model_file: Path, tmp_path: Path
) -> None:
    model = model_file.read_bytes()
    assert model.count(b"<0x41>") == 1
    (tmp_path / "t.model").write_bytes(model.replace(b"<0x41>", b"<0x4G>"))
    with pytest.raises(DataError, match="byte"):
        load_tokenizer(tmp_path / "t.model")


def test_an_option_of_another_wire_type_is_passed_over_as_sentencepiece_does(
    model_file: Path, tmp_path: Path
) -> None:
    options = b"\x1a\x00"  # add_dummy_prefix, a bool, as an empty string
    normalizer = b"\x1a" + bytes([len(options)]) + options  # merged into the one before
    (tmp_path / "t.model").write_bytes(model_file.read_bytes() + normalizer)
    load_tokenizer(tmp_path / "t.model")
    reasons = " ".join(sentencepiece_file.parse(normalizer).losses())
    assert "add_dummy_prefix" in reasons


def test_an_option_that_a_file_leaves_out_has_the_default_of_the_format() -> None:
    reasons = " ".join(sentencepiece_file.parse(b"").losses())
    for option in ("unigram", "byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces"):
        assert option in reasons
    assert "escape_whitespaces" not in reasons


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_still_loses_no_text(
    model_file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    model = bytearray(model_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    kept = data.draw(st.just(len(model)) | st.integers(0, len(model)))
    path.write_bytes(model[:kept])
    with contextlib.suppress(DataError):
        tokenizer = load_tokenizer(path)
        for text in HARD_TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("content", [b"", b"no such format", b"\x00" * 100])
def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(DataError, match="no tokenizer can be read"):
        load_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(path)
