"""Laws of a curated dataset: the same bytes by any workers and any kills, and nothing leaks."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpt.data.batches import split_of
from mpt.data.curate.account import read_account
from mpt.data.curate.personal import mask_all
from mpt.data.dataset import open_dataset
from mpt.data.journal import JOURNAL_NAME
from mpt.data.prepare import is_prepared, prepare
from mpt.errors import DataError
from mpt.recipe.curate import Curate, Decontaminate, Gopher, Length, NearDuplicates, Pii
from mpt.recipe.recipe import Recipe
from mpt.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.data.cases import files_of, recipe_for, some_texts, write_texts, write_tokenizer
from tests.data.processes import stopped_prepare

RULES = Curate(
    exact_duplicates=True,
    near_duplicates=NearDuplicates(),
    length=Length(min_characters=120),
    gopher=Gopher(
        min_words=None,
        max_top_2_gram=0.5,
        max_top_3_gram=0.5,
        max_top_4_gram=0.5,
        min_alphabetic_words=0.7,
        max_duplicate_lines=None,
        max_duplicate_line_characters=None,
        max_duplicate_paragraphs=None,
        max_duplicate_paragraph_characters=None,
        max_duplicate_5_gram=0.6,
        max_duplicate_6_gram=0.6,
        max_duplicate_7_gram=None,
        max_duplicate_8_gram=None,
        max_duplicate_9_gram=None,
        max_duplicate_10_gram=None,
    ),
    pii=Pii(email="mask", secrets="drop"),
    decontaminate=Decontaminate(eval_split=True),
)


def plain_texts(count: int) -> list[str]:
    """Texts of some hundred characters that share no sequence of words."""
    draw = random.Random(1)
    return [
        " ".join(f"wor{draw.randrange(1000)}" for _ in range(draw.randint(25, 80))) + f" n{number}"
        for number in range(count)
    ]


def messy_texts() -> list[str]:
    """Texts of which every rule has something to drop or to mask."""
    texts = plain_texts(60)
    texts[5] += " write to jane@example.org"
    texts[7] = texts[3]
    texts[20] = texts[6] + " x"
    texts[30] = texts[12].replace(" n12", " thirteen")
    texts[33] += " AKIAIOSFODNN7EXAMPLE"
    texts[40] = "short"
    texts[41] = "alpha beta " * 60
    texts[50] = texts[3]
    return texts


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts", messy_texts())


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 700)


def curated(out: Path, source: Path, **changes: Any) -> Recipe:
    """A recipe with a tokenizer that is there, so that nothing else takes time."""
    write_tokenizer(out / "tokenizer.model")
    return recipe_for(out, source, curate=replace(RULES, **changes))


@pytest.fixture
def clean(tmp_path: Path, corpus: Path) -> Path:
    prepare(curated(tmp_path / "clean", corpus), workers=1)
    return tmp_path / "clean"


def documents_of(dataset: Path, tokenizer: Path) -> list[str]:
    """The texts of a dataset; the last may be cut."""
    found, known = open_dataset(dataset), load_tokenizer(tokenizer)
    shards = [found.open_shard(number) for number in range(len(found.shards))]
    ids = [int(t) for shard in shards for row in range(len(shard)) for t in shard.sample(row)]
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == known.eod_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [known.decode(document) for document in documents if document]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, corpus: Path, clean: Path, workers: int
) -> None:
    prepare(curated(tmp_path / "many", corpus), workers=workers)
    assert files_of(tmp_path / "many") == files_of(clean)


@pytest.mark.parametrize("changes", [{}, {"exact_duplicates": False, "near_duplicates": None}])
def test_a_curated_prepare_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, corpus: Path, changes: dict[str, Any]
) -> None:
    recipe = curated(tmp_path / "clean", corpus, **changes)
    prepare(recipe, workers=1)
    assert recipe.prepare is not None
    out, kills, resumed = tmp_path / "out", 0, 0
    write_tokenizer(out / "tokenizer.model")
    while True:
        at_sync, workers = 6 + kills * 6, 1 + kills % 2
        rules = recipe.prepare.curate
        with stopped_prepare(
            out, corpus, workers=workers, at_sync=at_sync, curate=rules
        ) as process:
            if process is None:
                break
        kills += 1
        journal = out / "train.partial" / JOURNAL_NAME
        resumed += journal.exists() and journal.read_text().count("\n") > 2
    assert kills > 2
    assert resumed, "shards were finished before a kill"
    assert files_of(out) == files_of(tmp_path / "clean")


def test_what_is_kept_is_what_the_rules_say(clean: Path, corpus: Path) -> None:
    tally = {split: read_account(clean / split)["tally"] for split in ("train", "eval")}
    came = sum(each["came"][0] for each in tally.values())
    dropped = {name: counts for each in tally.values() for name, counts in each["dropped"].items()}
    assert came == 60
    assert {"exact_duplicates", "length.min_characters", "pii.secrets"} <= dropped.keys()
    assert "near_duplicates" in dropped or "decontaminate" in dropped
    texts = [mask_all(text) for text in messy_texts()]
    for split, each in tally.items():
        about = open_dataset(clean / split).about
        assert about is not None
        assert each["kept"] == [about.documents, about.text_bytes, about.tokens]
        assert each["kept"][0] + sum(n for n, _ in each["dropped"].values()) == each["came"][0]
        assert sum(each["before"]) == each["came"][0]
        assert sum(each["after"]) == each["kept"][0]
        assert sum(counts[4] for counts in each["sources"].values()) == about.tokens
        assert about.curation is not None
        assert about.curation["kept"] == each["kept"]
        *whole, last = documents_of(clean / split, clean / "tokenizer.model")
        assert set(whole) <= set(texts)
        assert all(split_of(text.encode(), 0.2) == split for text in whole)
        assert any(text.startswith(last) for text in texts)
        assert "jane@example.org" not in "".join(whole)
    vocabulary = read_account(clean / "train")["vocabulary"]
    ids = open_dataset(clean / "train")
    shards = [ids.open_shard(number) for number in range(len(ids.shards))]
    seen = {int(t) for shard in shards for row in range(len(shard)) for t in shard.sample(row)}
    assert vocabulary["seen"] == len(seen)


def grams(text: str) -> set[tuple[str, ...]]:
    found = text.split()
    return {tuple(found[at : at + 13]) for at in range(len(found) - 12)}


@pytest.mark.parametrize("backwards", [False, True])
def test_training_sees_nothing_of_the_eval_split_in_whatever_order_it_comes(
    tmp_path: Path, backwards: bool
) -> None:
    texts = plain_texts(60)
    held = [text for text in texts if split_of(text.encode(), 0.2) == "eval"]
    copies = [f"{text} again {number}" for text in held for number in range(3)]
    texts = [*copies, *texts] if backwards else [*texts, *copies]
    source = write_texts(tmp_path / "many", texts)
    prepare(curated(tmp_path / "out", source, near_duplicates=None, gopher=None), workers=1)
    train, held_out = (
        documents_of(tmp_path / "out" / split, tmp_path / "out" / "tokenizer.model")
        for split in ("train", "eval")
    )
    assert len(held_out) >= len(held) - 1
    seen = set().union(*map(grams, held_out))
    assert len(train) > 20
    assert not [text for text in train if grams(text) & seen]


def test_near_duplicates_are_on_one_side_of_the_split_alone(tmp_path: Path) -> None:
    texts = plain_texts(40)
    copies = [f"{text} again {number}" for text in texts for number in range(3)]
    source = write_texts(tmp_path / "many", texts + copies)
    prepare(curated(tmp_path / "out", source, gopher=None, decontaminate=None), workers=1)
    train, held_out = (
        {
            text.partition(" again ")[0]
            for text in documents_of(path, path.parent / "tokenizer.model")
        }
        for path in (tmp_path / "out" / "train", tmp_path / "out" / "eval")
    )
    assert len(train) > 20
    assert len(held_out) > 2
    assert not train & held_out


def test_test_texts_by_name_are_kept_out_of_training(tmp_path: Path, corpus: Path) -> None:
    texts = messy_texts()
    wanted = next(t for t in texts[10:12] if split_of(t.encode(), 0.2) == "train")
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": f"Say: {wanted[:150]}"}) + "\n")
    rules = Decontaminate(against=(str(exam),), text_key="question")
    recipe = curated(tmp_path / "out", corpus, decontaminate=rules, near_duplicates=None)
    prepare(recipe, workers=1)
    tally = read_account(tmp_path / "out" / "train")["tally"]
    assert any(each["text"][:40] == wanted[:40] for each in tally["examples"]["decontaminate"])
    assert wanted not in documents_of(tmp_path / "out" / "train", Path(recipe.tokenizer.path))


@pytest.mark.parametrize("change", ["rules", "test texts"])
def test_other_rules_start_over_and_are_refused_where_a_dataset_is_done(
    tmp_path: Path, corpus: Path, change: str
) -> None:
    exam = tmp_path / "exam.txt"
    exam.write_text("nothing of this is in the texts")
    rules = Decontaminate(against=(str(exam),))
    recipe = curated(tmp_path / "out", corpus, decontaminate=rules)
    assert recipe.prepare is not None
    with stopped_prepare(
        tmp_path / "out", corpus, workers=1, curate=recipe.prepare.curate
    ) as process:
        assert process is not None
    other = recipe
    if change == "rules":
        other = curated(tmp_path / "out", corpus, decontaminate=rules, length=Length())
    else:
        exam.write_text(messy_texts()[0])
    stages: list[str] = []
    prepare(other, workers=1, progress=lambda seen: stages.append(seen.stage))
    assert "again" in stages
    assert "resuming" not in stages
    assert is_prepared(recipe)
    if change == "rules":
        shutil.rmtree(tmp_path / "out" / "eval")
        with pytest.raises(DataError, match=r"prepare\.curate other rules \(now those of"):
            prepare(recipe, workers=1)


def test_without_rules_a_dataset_says_nothing_of_them(tmp_path: Path, corpus: Path) -> None:
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    prepare(recipe_for(tmp_path / "out", corpus), workers=1)
    assert not (tmp_path / "out" / "train" / "curation.json").exists()
    about = json.loads((tmp_path / "out" / "train" / "dataset.json").read_text())
    assert about["curation"] is None
    write_tokenizer(tmp_path / "empty" / "tokenizer.model")
    prepare(recipe_for(tmp_path / "empty", corpus, curate=Curate()), workers=1)
    shards = {name: data for name, data in files_of(tmp_path / "out").items() if "json" not in name}
    with_account = files_of(tmp_path / "empty")
    assert shards.items() <= with_account.items()
    assert "train/curation.json" in with_account


def test_a_tokenizer_learns_from_what_is_kept(tmp_path: Path) -> None:
    texts = [f"{text} zzzz@example.org" for text in some_texts(60)]
    source = write_texts(tmp_path / "many", texts)
    recipe = recipe_for(tmp_path / "out", source, curate=Curate(pii=Pii(email="mask")))
    plain = recipe_for(tmp_path / "plain", source)
    learned = [
        SentencePieceTokenizer(prepare(each, workers=1).tokenizer) for each in (recipe, plain)
    ]
    assert ["z" in {piece.text for piece in each.pieces} for each in learned] == [False, True]
