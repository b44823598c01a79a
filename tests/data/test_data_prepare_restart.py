"""Laws of going on: wherever a prepare was killed, no finished work is redone, no byte differs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpt.data.encode import Encoder
from mpt.data.journal import JOURNAL_NAME
from mpt.data.plan import Progress
from mpt.data.prepare import is_prepared, prepare
from mpt.errors import DataError
from mpt.recipe.recipe import Recipe
from tests.data.cases import (
    files_of,
    recipe_for,
    some_texts,
    with_model,
    write_texts,
    write_tokenizer,
)
from tests.data.processes import stopped_prepare


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts", some_texts(60))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 700)


class StopError(Exception):
    """Ends a prepare amid its work."""


def stop_amid(recipe: Recipe, tokens: int = 4000) -> None:
    """Prepare until there are so many tokens."""

    def watch(seen: Progress) -> None:
        if seen.tokens > tokens:
            raise StopError

    with pytest.raises(StopError):
        prepare(recipe, progress=watch, workers=1)


def stages_of(recipe: Recipe) -> list[str]:
    """Prepare, and return what it told of, each once."""
    stages: dict[str, None] = {}
    prepare(recipe, progress=lambda seen: stages.setdefault(seen.stage), workers=1)
    return list(stages)


def shards_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity and age of each finished shard: another file, or a new one, has others."""
    text = (folder / JOURNAL_NAME).read_text()
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("*.mds")
        if f'"{path.name}"' in text
    }


def test_a_prepare_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, corpus: Path
) -> None:
    clean, out = tmp_path / "clean", tmp_path / "out"
    prepare(recipe_for(clean, corpus), workers=1)
    kills = 0
    while True:
        # Further on each time: amid shards, directories, journals, dataset.json and index.json.
        at_sync, workers = 8 + kills * 5 // 2, 1 + kills % 2
        finished = shards_in(out / "train.partial") if kills else {}
        with stopped_prepare(out, corpus, workers=workers, at_sync=at_sync) as process:
            if process is None:
                break
        kills += 1
        assert not is_prepared(recipe_for(out, corpus)) or not list(out.glob("*.partial"))
        if (out / "train.partial" / JOURNAL_NAME).exists():
            now = shards_in(out / "train.partial")
            assert finished.items() <= now.items(), "a finished shard was written again"
    assert kills > 3
    assert files_of(out) == files_of(clean)
    assert not list(out.glob("*.partial"))


def test_a_kill_before_anything_is_durable_is_made_up_for(tmp_path: Path, corpus: Path) -> None:
    clean = tmp_path / "clean"
    prepare(recipe_for(clean, corpus), workers=1)
    for at_sync in (1, 2, 4, 6):
        out = tmp_path / f"out-{at_sync}"
        with stopped_prepare(out, corpus, workers=1, at_sync=at_sync) as process:
            assert process is not None
        prepare(recipe_for(out, corpus), workers=1)
        assert files_of(out) == files_of(clean)


def test_finished_documents_are_read_but_not_tokenized_again(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    recipe = replace(recipe, data=replace(recipe.data, eval=None))
    stop_amid(recipe)
    lines = (tmp_path / "out" / "train.partial" / JOURNAL_NAME).read_text().splitlines()
    next_batch = json.loads(lines[-1])[0]
    encoded: list[bytes] = []
    original = Encoder.encode

    def counted(self: Encoder, texts: Any, wanted: Any) -> Any:
        encoded.extend(texts)
        return original(self, texts, wanted)

    monkeypatch.setattr(Encoder, "encode", counted)
    assert "resuming" in stages_of(recipe)
    texts = [text.encode() for text in some_texts(60)]
    assert next_batch > 3
    assert encoded == texts[len(texts) - len(encoded) :]
    assert len(encoded) < len(texts) - next_batch


@pytest.mark.parametrize("damage", ["cut", "shard", "shard size", "no shard", "zeros"])
def test_a_damaged_journal_or_shard_costs_no_more_than_time(
    tmp_path: Path, corpus: Path, damage: str
) -> None:
    prepare(recipe_for(tmp_path / "clean", corpus), workers=1)
    stop_amid(recipe_for(tmp_path / "out", corpus))
    partial = tmp_path / "out" / "train.partial"
    journal, last = partial / JOURNAL_NAME, max(partial.glob("*.mds"))
    match damage:
        case "shard":
            payload = bytearray(last.read_bytes())
            payload[-1] ^= 1
            last.write_bytes(payload)
        case "shard size":
            os.truncate(last, 100)
        case "no shard":
            min(partial.glob("*.mds")).unlink()
        case "zeros":
            with journal.open("ab") as file:
                file.write(b"\0" * 100 + b"\n")
        case "cut":
            _check_every_cut(tmp_path, corpus, journal)
    prepare(recipe_for(tmp_path / "out", corpus), workers=1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def _check_every_cut(tmp_path: Path, corpus: Path, journal: Path) -> None:
    """Go on from copies whose journal was cut short in many places."""
    for size in range(0, journal.stat().st_size, 211):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        os.truncate(tmp_path / "copy" / "train.partial" / JOURNAL_NAME, size)
        prepare(recipe_for(tmp_path / "copy", corpus), workers=1)
        assert files_of(tmp_path / "copy") == files_of(tmp_path / "clean")


@pytest.mark.parametrize("change", ["text", "new file", "length"])
def test_a_changed_source_or_setting_starts_over_and_says_so(
    tmp_path: Path, corpus: Path, change: str
) -> None:
    recipe = recipe_for(tmp_path / "out", corpus)
    stop_amid(recipe)
    shutil.copy(tmp_path / "out" / "tokenizer.model", tmp_path)
    match change:
        case "text":
            (corpus / "0000.txt").write_text("other")
        case "new file":
            (corpus / "new.txt").write_text("new")
        case "length":
            recipe = with_model(recipe, max_seq_len=8)
    stages = stages_of(recipe)
    assert "again" in stages
    assert "resuming" not in stages
    (tmp_path / "clean").mkdir()
    shutil.copy(tmp_path / "tokenizer.model", tmp_path / "clean")
    clean = recipe_for(tmp_path / "clean", corpus)
    prepare(with_model(clean, max_seq_len=recipe.model.max_seq_len), workers=1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_too_little_text_leaves_nothing_to_go_on_with(tmp_path: Path, corpus: Path) -> None:
    recipe = recipe_for(tmp_path / "out", corpus, eval_fraction=1e-9)
    with pytest.raises(DataError, match="0 documents for eval"):
        prepare(recipe, workers=1)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_failure_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "sound"}\n{"text": 1}\n')
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    with pytest.raises(DataError, match=r"texts\.jsonl:2: no text under the key"):
        prepare(recipe_for(tmp_path / "out", source), workers=1)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_failure_after_it_keeps_what_is_finished(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in some_texts(60))
    source.write_text(lines + "no JSON\n")
    write_tokenizer(tmp_path / "out" / "tokenizer.model")
    recipe = recipe_for(tmp_path / "out", source)
    for _ in range(2):
        with pytest.raises(DataError, match=r"texts\.jsonl:61: not a line of JSON"):
            prepare(recipe, workers=1)
        assert shards_in(tmp_path / "out" / "train.partial")
