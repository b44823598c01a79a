"""Laws of preparing: all or nothing, the same bytes every time, nothing written over."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from mpt.data.dataset import check_dataset, open_dataset
from mpt.data.prepare import is_prepared, prepare
from mpt.errors import DataError
from mpt.tokenizer import Tokenizer, load_tokenizer
from tests.data.cases import (
    files_of,
    recipe_for,
    some_texts,
    with_model,
    write_texts,
    write_tokenizer,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts", some_texts(60))


def tokens_of(path: Path) -> list[int]:
    dataset = open_dataset(path)
    shards = [dataset.open_shard(number) for number in range(len(dataset.shards))]
    return [int(t) for shard in shards for row in range(len(shard)) for t in shard.sample(row)]


def test_every_document_is_on_one_side_of_the_split_and_whole(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    done = prepare(recipe)
    tokenizer = load_tokenizer(done.tokenizer)
    texts = []
    for dataset in (done.streams["only"], done.eval):
        assert dataset is not None
        assert dataset.about is not None
        check_dataset(dataset, recipe.model, tokenizer)
        tokens = tokens_of(dataset.path)
        about = dataset.about
        assert len(tokens) == about.tokens - about.dropped_tokens == 16 * len(dataset)
        assert about.dropped_tokens < 16
        *documents, last = _split_at(tokens, tokenizer)
        texts += documents
        assert about.documents in (len(documents), len(documents) + 1)
        assert about.text_bytes >= sum(len(text.encode()) for text in documents)
        assert last == "" or any(text.startswith(last) for text in some_texts(60))
    assert len(set(texts)) == len(texts)
    assert set(texts) <= set(some_texts(60))
    assert len(texts) >= 58


def _split_at(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """The texts between end-of-document tokens, and what comes after the last."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == tokenizer.eod_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(document) for document in documents]


def test_a_text_that_occurs_twice_is_never_on_both_sides(tmp_path: Path) -> None:
    texts = some_texts(40) * 2
    recipe = recipe_for(tmp_path / "out", write_texts(tmp_path / "texts", texts))
    done = prepare(recipe)
    assert done.eval is not None
    counts = [d.about.documents for d in (*done.streams.values(), done.eval) if d.about]
    assert sum(counts) == 80
    assert all(count % 2 == 0 and count for count in counts)


def test_the_bytes_depend_on_the_documents_and_the_recipe_alone(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(recipe_for(tmp_path / "one", corpus))
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 700)
    prepare(recipe_for(tmp_path / "two", corpus))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) > 7  # several shards


def test_a_second_call_touches_nothing(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    assert not is_prepared(recipe)
    first = prepare(recipe)
    assert is_prepared(recipe)
    assert len(first.made) == 3
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    shutil.rmtree(corpus)  # not even the source
    assert prepare(recipe).made == ()
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_a_source_is_the_same_by_its_relative_and_its_absolute_path(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(recipe_for(tmp_path / "out", "texts"))
    assert prepare(recipe_for(tmp_path / "out", corpus)).made == ()
    assert prepare(recipe_for(tmp_path / "out", "./texts/")).made == ()


def test_only_what_is_missing_is_made_again(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    prepare(recipe)
    before = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "train")
    assert prepare(recipe).made == (tmp_path / "out" / "train",)
    assert files_of(tmp_path / "out") == before


def test_without_held_out_data_every_document_is_trained_on(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    done = prepare(replace(recipe, data=replace(recipe.data, eval=None)))
    assert done.eval is None
    about = done.streams["only"].about
    assert about is not None
    assert about.documents == 60
    with pytest.raises(DataError, match=r"eval_fraction 0\.0 \(now 0\.2\)"):
        prepare(recipe)  # held out now would be held out from nothing


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("length", r"samples of 16 \(now 8\)"),
        ("source", r"source .*texts \(now .*other\)"),
        ("fraction", r"eval_fraction 0\.2 \(now 0\.5\)"),
        ("tokenizer", "tokenizer_sha256"),
    ],
)
def test_a_dataset_made_otherwise_is_refused_and_left_alone(
    tmp_path: Path, corpus: Path, change: str, words: str
) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    prepare(recipe)
    shutil.rmtree(tmp_path / "out" / "eval")
    match change:
        case "length":
            recipe = with_model(recipe, max_seq_len=8)
        case "source":
            other = shutil.copytree(corpus, tmp_path / "other")
            recipe = recipe_for(tmp_path / "out", other)
        case "fraction":
            recipe = recipe_for(tmp_path / "out", corpus, eval_fraction=0.5)
        case "tokenizer":
            write_tokenizer(tmp_path / "out" / "tokenizer.model")
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=words) as caught:
        prepare(recipe)
    assert f"Delete {tmp_path / 'out' / 'train'}" in str(caught.value)
    assert files_of(tmp_path / "out") == before


def test_a_path_that_holds_something_else_is_refused(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"train: is in the way: not a dataset, and not empty"):
        prepare(recipe_for(tmp_path / "out", corpus))
    assert (tmp_path / "out" / "train" / "thesis.tex").read_text() == "years of work"


def test_train_and_held_out_may_not_share_a_place(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    assert recipe.data.eval is not None
    for path in (f"{tmp_path}/out/x/../train", f"{tmp_path}/out/train/eval"):
        data = replace(recipe.data, eval=replace(recipe.data.eval, path=path))
        with pytest.raises(DataError, match="lies in the same place as"):
            prepare(replace(recipe, data=data))


@pytest.mark.parametrize(
    ("texts", "settings", "words"),
    [
        ([], {}, "no files there"),
        ([""], {}, "no documents to train a tokenizer on"),
        (["ab"], {"eval_fraction": 0.0}, r"1 documents for train make \d tokens, not one sample"),
        (some_texts(30), {"eval_fraction": 1e-9}, r"0 documents for eval .*raise prepare\.eval_f"),
        (some_texts(30), {"shard_bytes": 2**33}, r"prepare\.shard_bytes: 8589934592 is too large"),
    ],
)
def test_too_little_text_is_an_error_that_says_how_much_there_was(
    tmp_path: Path, texts: list[str], settings: dict[str, float], words: str
) -> None:
    recipe = recipe_for(tmp_path / "out", write_texts(tmp_path / "texts", texts), **settings)
    if texts != [""]:
        write_tokenizer(tmp_path / "out" / "tokenizer.model")
    with pytest.raises(DataError, match=words):
        prepare(recipe)
    assert set(files_of(tmp_path / "out")) <= {"tokenizer.model"}


def test_an_existing_tokenizer_is_used_and_must_fit_the_model(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus, tokenizer="existing")
    with pytest.raises(DataError, match=r"tokenizer\.model: no such file"):
        prepare(recipe)
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    with pytest.raises(DataError, match=r"300 ids, but model\.vocab_size is 290"):
        prepare(with_model(recipe, vocab_size=290))
    assert str(prepare(recipe).streams["only"].shards[0].encoding) == "ndarray:uint16:16"


def test_more_ids_than_uint16_holds_are_written_as_uint32(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt.data.encode.UINT16_IDS", 299)
    done = prepare(recipe_for(tmp_path / "out", corpus))
    assert str(done.streams["only"].shards[0].encoding) == "ndarray:uint32:16"
    prepare(recipe_for(tmp_path / "out", corpus))


def test_without_a_prepare_section_what_is_missing_is_named(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    bare = replace(recipe, prepare=None)
    with pytest.raises(DataError, match=r"tokenizer\.model: not there.*no `prepare:` section"):
        prepare(bare)
    prepare(recipe)
    assert prepare(bare).made == ()


@pytest.mark.parametrize("path", ["s3://bucket/train", "x\0y", "x" * 5000])
def test_a_path_that_cannot_be_written_to_is_an_error(
    tmp_path: Path, corpus: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    monkeypatch.chdir(tmp_path)
    stream = replace(recipe.data.streams["only"], path=path)
    recipe = replace(recipe, data=replace(recipe.data, streams={"only": stream}))
    assert not is_prepared(recipe)
    with pytest.raises(DataError):
        prepare(recipe)


def test_a_password_in_the_source_is_not_recorded(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in some_texts(60))
    fsspec.filesystem("memory").pipe("/me:secret@host/x.jsonl", lines.encode())
    done = prepare(recipe_for(tmp_path / "out", "memory://me:secret@host/x.jsonl"))
    assert done.eval is not None
    assert done.eval.about is not None
    assert done.eval.about.source == "memory://host/x.jsonl"
    assert not [n for n, content in files_of(tmp_path / "out").items() if b"secret" in content]


def test_dataset_json_says_how_it_was_made(tmp_path: Path, corpus: Path) -> None:
    done = prepare(recipe_for(tmp_path / "out", corpus))
    about = json.loads((tmp_path / "out" / "train" / "dataset.json").read_text())
    assert about["source"] == str(corpus)
    assert about["split"] == "train"
    assert about["tokenizer_sha256"] == load_tokenizer(done.tokenizer).sha256
    assert about["created_by"].startswith("mpt ")
    assert done.streams["only"].tokens_per_byte == about["tokens"] / about["text_bytes"]
