"""Laws of a tokenizer.json as a tokenizer: no text is lost, or it is refused with the reason."""

from __future__ import annotations

import contextlib
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.errors import DataError, UsageError
from mpt.hf.tokenizer import write_tokenizer
from mpt.tokenizer import (
    CONFIG_FILE,
    EOD_PIECE,
    JSON_FILE,
    MODEL_FILE,
    Tokenizer,
    load_tokenizer,
    tokenizer_file_in,
    tokenizer_files,
    train_tokenizer,
)
from mpt.tokenizer_json import _PATTERNS

tokenizers = pytest.importorskip("tokenizers")

HARD_TEXTS: list[str] = json.loads(
    (Path(__file__).parent / "golden/hard_texts.json").read_text("utf-8")
)
ODD: list[Any] = [None, True, 0, -1, 2**40, 0.5, "", "a", "\ud800", [], {}, [["a"]]]
Content = dict[str, Any]
Change = Callable[[Content], Any]


@pytest.fixture(scope="module")
def content() -> Content:
    """A byte-level tokenizer as another program would have trained it."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[EOD_PIECE, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[:10]
    backend.train_from_iterator([file.read_text("utf-8") for file in files], trainer)
    made: Content = json.loads(backend.to_str())
    return made


@pytest.fixture(scope="module")
def byte_level(content: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("byte-level"), content)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mpt itself exports of a sentencepiece model."""
    directory = tmp_path_factory.mktemp("fallback")
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [file.read_text("utf-8") for file in sorted(folder.glob("*.py"))[:10]]
    train_tokenizer(texts, directory / "t.model", vocab_size=600)
    write_tokenizer(directory / "t.model", directory)
    return directory / JSON_FILE


def written(directory: Path, content: Content, *changes: Change) -> Path:
    """Write a tokenizer.json, with something changed in a copy."""
    content = json.loads(json.dumps(content))
    for change in changes:
        change(content)
    (directory / JSON_FILE).write_text(json.dumps(content), encoding="utf-8")
    return directory / JSON_FILE


@pytest.fixture(scope="module", params=["byte_level", "fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_back_as_they_were(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=st.text(st.sampled_from(f"{EOD_PIECE}<unk0xA>/s ")))
def test_no_text_becomes_a_special_id(tokenizer: Tokenizer, text: str) -> None:
    for spelled in (text, EOD_PIECE + text, "<|pad|>" + text):
        assert all(tokenizer.token_bytes(token) for token in tokenizer.encode(spelled))


def test_special_ids_decode_to_nothing_and_others_are_refused(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert tokenizer.decode([*ids, tokenizer.eod_id, *ids]) == "éé"
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match="is not within the tokenizer's"):
            tokenizer.token_bytes(token)


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"lone surrogate, U\+D800, at character 2"):
        tokenizer.encode("ab\ud800")


def test_a_batch_is_each_text_by_itself(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(HARD_TEXTS) == [tokenizer.encode(text) for text in HARD_TEXTS]


def test_ids_are_those_of_the_sentencepiece_model_it_was_made_of(fallback: Path) -> None:
    model = load_tokenizer(fallback.with_name("t.model"))
    ours = load_tokenizer(fallback)
    assert (ours.vocab_size, ours.eod_id) == (model.vocab_size, model.eod_id)
    for text in HARD_TEXTS:
        assert ours.encode(text) == model.encode(text)
    for token in range(model.vocab_size):
        assert ours.token_bytes(token) == model.token_bytes(token)


def test_ids_are_those_of_the_library(byte_level: Path, content: Content) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(byte_level))
    ours = load_tokenizer(byte_level)
    assert ours.vocab_size == 700
    for text in HARD_TEXTS:
        if "<|" not in text:
            assert ours.encode(text) == theirs.encode(text).ids


def test_what_the_file_would_cut_off_fill_up_or_put_around_is_left_alone(
    content: Content, byte_level: Path, tmp_path: Path
) -> None:
    def wrap(c: Content) -> None:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.enable_truncation(3)
        backend.enable_padding(length=9)
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{EOD_PIECE} $A", special_tokens=[(EOD_PIECE, 0)]
        )
        c |= json.loads(backend.to_str())

    wrapped, plain = load_tokenizer(written(tmp_path, content, wrap)), load_tokenizer(byte_level)
    assert wrapped.sha256 == plain.sha256
    for text in ("", "a", "some text that is longer than three tokens"):
        assert wrapped.encode(text) == plain.encode(text)


@pytest.mark.parametrize("pattern", sorted(_PATTERNS))
def test_text_may_be_cut_by_the_patterns_of_known_models(
    content: Content, tmp_path: Path, pattern: str
) -> None:
    def cut(c: Content) -> None:
        byte_level = c["pre_tokenizer"] | {"use_regex": False}
        parts = [split(pattern), {"type": "Digits", "individual_digits": True}, byte_level]
        c["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}

    tokenizer = load_tokenizer(written(tmp_path, content, cut))
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def specials_at_the_end(content: Content) -> None:
    """As Llama 3 has it: special tokens are not in the vocabulary that merging knows."""
    vocabulary = content["model"]["vocab"]
    for token in content["added_tokens"]:
        del vocabulary[token["content"]]
        token["id"] += 698
    vocabulary |= {text: token - 2 for text, token in vocabulary.items()}


def test_whole_words_may_be_tokens_unless_a_special_one_is_among_them(
    content: Content, tmp_path: Path
) -> None:
    whole_words = set_in("model", "ignore_merges", to=True)
    tokenizer = load_tokenizer(written(tmp_path, content, whole_words, specials_at_the_end))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (700, 698)
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(DataError, match="ordinary text becomes"):
        load_tokenizer(written(tmp_path, content, whole_words))


def set_in(*path: str | int, to: Any) -> Change:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def cut_by(part: Content) -> Change:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    sequence = {"type": "Sequence", "pretokenizers": [part, byte_level]}
    return set_in("pre_tokenizer", to=sequence)


def split(pattern: str, behavior: str = "Isolated") -> Content:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


def plain_token(content: Content) -> None:
    token = content["added_tokens"][1] | {"special": False, "content": "<tool>", "id": 700}
    content["added_tokens"].append(token)


def special_word(content: Content) -> None:
    """An ordinary piece, said to be special."""
    (left, right), vocabulary = content["model"]["merges"][0], content["model"]["vocab"]
    token = {"content": left + right, "id": vocabulary[left + right]}
    content["added_tokens"].append(content["added_tokens"][1] | token)


def special_letter(content: Content) -> None:
    token = {"content": "a", "id": content["model"]["vocab"]["a"]}
    content["added_tokens"].append(content["added_tokens"][1] | token)


def without_a_byte(content: Content) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["\u0123\u0123"] = vocabulary.pop("\u0123")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_in("normalizer", to={"type": "NFC"}), r"its normalizer \(NFC\) changes characters"),
        (set_in("model", "dropout", to=0.1), "dropout is 0.1"),
        (set_in("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix is '</w>'"),
        (set_in("pre_tokenizer", "add_prefix_space", to=True), "add_prefix_space puts a space"),
        (set_in("pre_tokenizer", to={"type": "Whitespace"}), "does not end in ByteLevel"),
        (set_in("pre_tokenizer", to=None), "does not end in ByteLevel"),
        (cut_by({"type": "Punctuation", "behavior": "Isolated"}), "pre-tokenizer is Punctuation"),
        (cut_by(split(sorted(_PATTERNS)[0], "Removed")), "splits text as 'Removed'"),
        (cut_by(split("(a+)+$")), "a pattern that is not known"),
        (plain_token, "added tokens that are cut out of ordinary text, such as '<tool>'"),
        (special_word, "which is special"),
        (special_letter, "ordinary text becomes 'a', which is special"),
        (without_a_byte, "1 of 256 bytes have no token"),
        (set_in("model", "vocab", "東", to=700), "not spelled in bytes"),
        (set_in("decoder", to={"type": "WordPiece"}), "neither byte-level nor with byte_fallback"),
        (set_in("model", "type", to="Unigram"), "its model is Unigram, not BPE"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused_with_the_reason(
    content: Content, tmp_path: Path, change: Change, said: str
) -> None:
    path = written(tmp_path, content, change)
    with pytest.raises(DataError, match=said) as refused:
        load_tokenizer(path)
    assert "; " not in str(refused.value)  # that reason, and no other


def without_bytes(content: Content) -> None:
    content["model"]["vocab"]["<0xZZ>"] = content["model"]["vocab"].pop("<0x41>")


def reaches_a_byte(content: Content) -> None:
    content["model"]["merges"].append(["<0x41", ">"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_in("pre_tokenizer", to={"type": "Metaspace"}), r"pre-tokenizer \(Metaspace\)"),
        (set_in("model", "byte_fallback", to=False), "neither byte-level nor with byte_fallback"),
        (set_in("decoder", to={"type": "Fuse"}), "its decoder does more, or less"),
        (without_bytes, "1 of 256 bytes have no token"),
        (reaches_a_byte, "ordinary text becomes '<0x41>', which is special"),
        (set_in("model", "ignore_merges", to=True), "ordinary text becomes '<0x00>'"),
    ],
)
def test_a_tokenizer_with_bytes_below_is_refused_with_the_reason(
    fallback: Path, tmp_path: Path, change: Change, said: str
) -> None:
    path = written(tmp_path, json.loads(fallback.read_text("utf-8")), change)
    with pytest.raises(DataError, match=said):
        load_tokenizer(path)


def test_every_reason_is_named_at_once(content: Content, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        content,
        set_in("normalizer", to={"type": "NFC"}),
        set_in("model", "dropout", to=0.1),
    )
    with pytest.raises(DataError, match=r"NFC.*; dropout"):
        load_tokenizer(path)


def test_the_end_of_document_is_as_the_file_beside_says(content: Content, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    without = load_tokenizer(path)
    assert without.eod_id == 0
    for said in ("<|pad|>", {"content": "<|pad|>"}):
        (tmp_path / CONFIG_FILE).write_text(json.dumps({"eos_token": said}))
        assert load_tokenizer(path).eod_id == 1
        assert load_tokenizer(path).sha256 != without.sha256
    nothings: tuple[Any, ...] = ({}, {"eos_token": None}, [])
    for nothing in nothings:
        (tmp_path / CONFIG_FILE).write_text(json.dumps(nothing))
        assert load_tokenizer(path).eod_id == 0


@pytest.mark.parametrize("said", ["the", "<|nowhere|>", 7, ["<|pad|>"]])
def test_an_end_of_document_that_is_not_special_is_refused(
    content: Content, tmp_path: Path, said: Any
) -> None:
    path = written(tmp_path, content)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"eos_token": said}))
    with pytest.raises(DataError, match="which token ends a document is not clear"):
        load_tokenizer(path)


def test_an_end_of_document_that_could_be_either_is_refused(
    content: Content, tmp_path: Path
) -> None:
    def second(c: Content) -> None:
        c["added_tokens"].append(c["added_tokens"][1] | {"content": "</s>", "id": 700})

    path = written(tmp_path, content, second)
    with pytest.raises(DataError, match=r"not clear.*Special are: '</s>', '<\|endoftext\|>'"):
        load_tokenizer(path)
    (tmp_path / CONFIG_FILE).write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(path).eod_id == 700


def test_a_copy_is_the_same_tokenizer(content: Content, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    (tmp_path / CONFIG_FILE).write_text('{"eos_token": "<|pad|>"}')
    path = path.rename(tmp_path / "mine.json")
    (tmp_path / "copy").mkdir()
    assert tokenizer_file_in(tmp_path / "copy") is None
    for name, kept in tokenizer_files(path).items():
        (tmp_path / "copy" / name).write_bytes(kept)
    copy = tokenizer_file_in(tmp_path / "copy")
    assert copy == tmp_path / "copy" / JSON_FILE
    assert load_tokenizer(copy).sha256 == load_tokenizer(path).sha256
    assert load_tokenizer(copy).eod_id == 1


def test_of_an_export_the_sentencepiece_model_counts(fallback: Path, tmp_path: Path) -> None:
    model = fallback.with_name("t.model")
    assert tokenizer_files(model) == {MODEL_FILE: model.read_bytes()}
    write_tokenizer(model, tmp_path)
    assert tokenizer_file_in(tmp_path) == tmp_path / MODEL_FILE


def test_no_sentencepiece_model_is_trained_under_the_name_of_the_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"end it in \.model"):
        train_tokenizer(HARD_TEXTS, tmp_path / JSON_FILE, vocab_size=300)
    assert not list(tmp_path.iterdir())


def test_the_hash_is_of_what_counts_not_of_the_layout(content: Content, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    digest = load_tokenizer(path).sha256
    path.write_text(json.dumps(content, indent=3, sort_keys=True), encoding="utf-8")
    assert load_tokenizer(path).sha256 == digest
    merges = content["model"]["merges"]
    swapped = written(tmp_path, content, set_in("model", "merges", to=merges[::-1]))
    assert load_tokenizer(swapped).sha256 != digest


def test_without_the_library_it_says_what_to_install(
    byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'mpt-train\[hf\]'"):
        load_tokenizer(byte_level)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "\x0a\x0d",
        '{"model": {}}',
        '{"model": {"type": "BPE", "vocab": 1, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0.0}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 7}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [[]]}, "decoder": 1}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": 1}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [1]}',
        "[" * 100_000,
    ],
)
def test_what_is_no_tokenizer_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / JSON_FILE
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(path)
    path.write_text(text)
    with pytest.raises(DataError, match="not a"):
        load_tokenizer(path)


def test_a_file_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / JSON_FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="larger than"):
        load_tokenizer(tmp_path / JSON_FILE)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_still_loses_no_text(
    content: Content, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One value anywhere in it is something else."""
    damaged = json.loads(json.dumps(content))
    at: Any = damaged
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = data.draw(st.sampled_from(sorted(keys, key=str)[:40]))
        if isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
            at = at[key]
            continue
        at[key] = data.draw(st.sampled_from(ODD))
        break
    path = written(tmp_path_factory.mktemp("damaged"), damaged)
    with contextlib.suppress(DataError):
        tokenizer = load_tokenizer(path)
        for text in HARD_TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text
