"""Laws of Delta Lake tables: the rows of one version, in one order, whatever happens to the log."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt.data.dataset import open_dataset
from mpt.data.fingerprint import fingerprint
from mpt.data.plan import Progress
from mpt.data.prepare import is_prepared, prepare
from mpt.data.source import documents, find_source
from mpt.errors import DataError, RecipeError
from mpt.recipe.delta import Delta
from mpt.recipe.frozen import absolute, freeze
from mpt.recipe.load import load, loads
from mpt.recipe.predicate import columns_of, parse_predicate
from mpt.recipe.recipe import Recipe
from tests.data.cases import files_of, recipe_for, some_texts, write_tokenizer
from tests.data.tables import adds, append, commit, delete_by_vector

ROWS: list[dict[str, Any]] = [
    {
        "text": f"text {i}",
        "lang": ("en", "de é/", "fr%", None)[i % 4],
        "n": i if i % 5 else None,
        "score": i / 2,
        "good": bool(i % 2),
        "day": datetime(2026, 1, 1 + i % 28, tzinfo=UTC).date(),
    }
    for i in range(40)
]


MADE_S = 1_780_000_000
"""When the first version was made."""


def read(path: Path | str, **selection: Any) -> list[str]:
    chosen = Delta(**selection) if selection else None
    found = documents(find_source(str(path), selection=chosen), lambda *_: None)
    return [document.text for document in found]


def texts_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows in four versions a minute apart, partitioned by odd values; not to be changed."""
    path = tmp_path_factory.mktemp("delta") / "table"
    for start in range(0, 40, 10):
        append(path, ROWS[start : start + 10], partition_by=["lang"])
    for log in (path / "_delta_log").iterdir():
        made_s = MADE_S + 60 * int(log.stem)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            line.get("commitInfo", {})["timestamp"] = 1000 * made_s
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.utime(log, (made_s, made_s))
    return path


def test_each_version_is_read_and_an_appended_one_begins_as_the_one_before(table: Path) -> None:
    everything = read(table)
    assert sorted(everything) == sorted(texts_of(ROWS))
    for version in range(4):
        found = read(table, version=version)
        assert len(found) == 10 * (version + 1)
        assert everything[: len(found)] == found
        assert sorted(found) == sorted(texts_of(ROWS[: len(found)]))
    assert read(f"delta:{table}") == everything
    assert read(f"file://{table}") == everything
    with pytest.raises(DataError, match=r"table: cannot be read: .*version 9"):
        read(table, version=9)


def test_the_order_does_not_change_with_a_checkpoint_of_the_log(
    tmp_path: Path, table: Path
) -> None:
    shutil.copytree(table, tmp_path / "t")
    before, digest = read(tmp_path / "t"), fingerprint(find_source(str(tmp_path / "t"))).digest
    DeltaTable(str(tmp_path / "t")).create_checkpoint()
    for log in (tmp_path / "t" / "_delta_log").glob("*[012].json"):
        log.unlink()
    assert read(tmp_path / "t") == before
    assert fingerprint(find_source(str(tmp_path / "t"))).digest == digest


def test_a_time_names_the_version_that_was_there_and_none_before_the_first(table: Path) -> None:
    for seconds, count in ((0, 10), (60, 20), (119, 20), (120, 30), (10_000, 40)):
        when = datetime.fromtimestamp(MADE_S + seconds, UTC).isoformat()
        assert len(read(table, timestamp=when)) == count
    assert len(read(table, timestamp="2999-01-01T00:00:00")) == 40
    with pytest.raises(DataError, match="the table had no version yet at 2001"):
        read(table, timestamp="2001-01-01T00:00:00Z")


CONDITIONS = [
    "lang = 'en'",
    "lang != 'en' AND n >= 10",
    "NOT (lang = 'en' OR n < 7)",
    "lang IS NULL",
    "n IS NOT NULL AND lang IS NOT NULL",
    "n IN (1, 2, 3, 8)",
    "n NOT IN (1, 2, 3, 8)",
    "lang NOT IN ('en', 'fr%')",
    "NOT lang IN ('en')",
    "text LIKE 'text 1%'",
    "text NOT LIKE 'text _'",
    "good = TRUE OR score > 1.5e1",
    "score <= 3",
    "n > 3.5",
    "day >= '2026-01-20'",
    "\"lang\" = 'de é/' AND `n` <> 9",
    "((n = 1)) OR lang = 'it''s'",
]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_chooses_the_rows_that_deltas_own_engine_chooses(
    table: Path, condition: str
) -> None:
    import pyarrow as pa

    in_sql = condition.replace("`", '"')
    oracle = pa.table(DeltaTable(str(table)).scan(columns=["text"], predicate=in_sql))
    found = read(table, predicate=condition)
    assert sorted(found) == sorted(oracle.column("text").to_pylist())
    rest = set(found)
    assert found == [text for text in read(table) if text in rest]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("length > 3", "no column length; there are: text, lang, n"),
        ("n = 'many'", "'many' is no value of the column 'n', which holds int64"),
        ("text = 3", "3 is no value of the column 'text'"),
        ("n LIKE 'a%'", "prepare.delta.predicate: "),
    ],
)
def test_a_condition_that_does_not_fit_the_table_is_an_error(
    table: Path, condition: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read(table, predicate=condition)


def test_a_partition_that_is_not_chosen_is_not_opened(tmp_path: Path, table: Path) -> None:
    shutil.copytree(table, tmp_path / "t")
    for add in adds(tmp_path / "t"):
        if add["partitionValues"]["lang"] != "en":
            (tmp_path / "t" / unquote(add["path"])).unlink()
    assert read(tmp_path / "t", predicate="lang = 'en'") == read(table, predicate="lang = 'en'")
    with pytest.raises(DataError, match=r"\.parquet: cannot be read: .*was it removed by VACUUM\?"):
        read(tmp_path / "t")


def test_rows_deleted_by_rewriting_or_by_vectors_are_gone_and_come_back_with_the_version(
    tmp_path: Path, table: Path
) -> None:
    for way in ("rewritten", "vectors"):
        path = tmp_path / way
        shutil.copytree(table, path)
        before = read(path)
        if way == "rewritten":
            DeltaTable(str(path)).delete("n = 12 OR n = 31")
        else:
            files = [add["path"] for add in adds(path)]
            assert any("%" in file for file in files)
            delete_by_vector(path, {file: [1] for file in files[::2]})
        import pyarrow as pa

        kept = read(path)
        oracle = pa.table(DeltaTable(str(path)).scan(columns=["text"]))
        assert sorted(kept) == sorted(oracle.column("text").to_pylist())
        assert 0 < len(before) - len(kept) <= 8
        assert read(path, version=3) == before
        assert read(path, predicate="n > 20") == [
            t for t in kept if t in read(table, predicate="n > 20")
        ]


def test_compaction_changes_the_files_and_not_the_rows(tmp_path: Path, table: Path) -> None:
    shutil.copytree(table, tmp_path / "t")
    DeltaTable(str(tmp_path / "t")).optimize.compact()
    assert sorted(read(tmp_path / "t")) == sorted(read(table))
    assert read(tmp_path / "t", version=3) == read(table)


def test_a_column_that_older_files_lack_is_null_there(tmp_path: Path) -> None:
    append(tmp_path / "t", [{"id": 1}, {"id": 2}])
    append(tmp_path / "t", [{"id": 3, "text": "c", "lang": "en"}], schema_mode="merge")
    assert read(tmp_path / "t") == ["c"]
    assert read(tmp_path / "t", predicate="lang = 'en'") == ["c"]
    assert read(tmp_path / "t", predicate="id < 3") == []


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ({"add": {"path": "../../etc/x.parquet"}}, "lies outside of the table"),
        ({"add": {"path": "/etc/x.parquet"}}, "lies outside of the table"),
        ({"add": {"path": "file:///etc/x.parquet"}}, "lies outside of the table"),
        ({"metaData": {"configuration": {"delta.columnMapping.mode": "name"}}}, "columnMapping"),
    ],
)
def test_a_table_that_is_hostile_or_not_understood_is_refused(
    tmp_path: Path, action: dict[str, Any], words: str
) -> None:
    append(tmp_path / "t", [{"text": "a"}])
    shutil.copy(next((tmp_path / "t").glob("*.parquet")), tmp_path / "x.parquet")
    log = tmp_path / "t" / "_delta_log" / "00000000000000000000.json"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    if "add" in action:
        entry = next(entry for entry in entries if "add" in entry)
        commit(tmp_path / "t", [{"add": {**entry["add"], **action["add"]}}])
    else:
        entry = next(entry for entry in entries if "metaData" in entry)
        protocol = {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}
        commit(
            tmp_path / "t", [protocol, {"metaData": {**entry["metaData"], **action["metaData"]}}]
        )
    with pytest.raises(DataError, match=words):
        read(tmp_path / "t")


def test_what_is_said_of_a_table_is_refused_for_other_sources(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"`prepare\.delta` is for Delta Lake tables"):
        read(tmp_path, version=3)
    with pytest.raises(DataError, match="nothing: cannot be read"):
        read(f"delta:{tmp_path}/nothing")


# -- Prepared datasets


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of sixty texts at version 0."""
    monkeypatch.setattr("mpt.data.batches.BATCH_CHARACTERS", 700)
    append(tmp_path / "table", [{"text": text} for text in some_texts(60)])
    for name in ("out", "clean"):
        write_tokenizer(tmp_path / name / "tokenizer.model")
    return tmp_path / "table"


class StopError(Exception):
    """Ends a prepare amid its work."""


def stop_amid(recipe: Recipe) -> None:
    def watch(seen: Progress) -> None:
        if seen.tokens > 4000:
            raise StopError

    with pytest.raises(StopError):
        prepare(recipe, progress=watch, workers=1)


def test_a_table_that_grows_under_a_killed_prepare_does_not_change_the_result(
    tmp_path: Path, growing: Path
) -> None:
    prepare(recipe_for(tmp_path / "clean", growing), workers=1)
    recipe = recipe_for(tmp_path / "out", growing)
    stop_amid(recipe)
    append(growing, [{"text": text} for text in some_texts(20, seed=2)])
    stages: set[str] = set()
    prepare(recipe, workers=1, progress=lambda seen: stages.add(seen.stage))
    assert {"version", "resuming"} <= stages
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")
    about = open_dataset(tmp_path / "out" / "train").about
    assert about is not None
    assert about.source_version == "0"
    assert is_prepared(recipe)
    # What is there is kept, though the table has grown; made anew, it is of the new version.
    assert prepare(recipe).made == ()
    shutil.rmtree(tmp_path / "out" / "train")
    shutil.rmtree(tmp_path / "out" / "eval")
    about = prepare(recipe, workers=1).streams["only"].about
    assert about is not None
    assert about.source_version == "1"


def test_a_version_that_is_gone_when_the_work_goes_on_is_said(
    tmp_path: Path, growing: Path
) -> None:
    recipe = recipe_for(tmp_path / "out", growing)
    stop_amid(recipe)
    append(growing, [{"text": text} for text in some_texts(20, seed=2)])
    DeltaTable(str(growing)).create_checkpoint()
    (growing / "_delta_log" / f"{0:020d}.json").unlink()
    with pytest.raises(DataError, match=r"read at version 0 .* delete .*train\.source\.json"):
        prepare(recipe, workers=1)
    (tmp_path / "out" / "train.source.json").unlink()
    about = prepare(recipe, workers=1).streams["only"].about
    assert about is not None
    assert about.source_version == "1"


def test_a_failure_that_leaves_nothing_ties_nobody_to_a_version(
    tmp_path: Path, growing: Path
) -> None:
    recipe = recipe_for(tmp_path / "out", growing, eval_fraction=1e-9)
    with pytest.raises(DataError, match="0 documents for eval"):
        prepare(recipe, workers=1)
    assert not list((tmp_path / "out").glob("*.source.json"))
    append(growing, [{"text": text} for text in some_texts(20, seed=2)])
    about = prepare(recipe_for(tmp_path / "out", growing), workers=1).streams["only"].about
    assert about is not None
    assert about.source_version == "1"
    assert {path.name for path in (tmp_path / "out").iterdir()} - {".mpt-prepare.lock"} == {
        *("tokenizer.model", "train", "eval")
    }


def test_a_dataset_of_another_selection_is_in_the_way(tmp_path: Path, growing: Path) -> None:
    recipe = recipe_for(tmp_path / "out", growing)
    prepare(recipe, workers=1)
    about = open_dataset(tmp_path / "out" / "eval").about
    assert about is not None
    assert (about.selection, about.source) == (None, str(growing))
    assert recipe.prepare is not None
    other = replace(recipe, prepare=replace(recipe.prepare, delta=Delta(predicate="text > 'b'")))
    with pytest.raises(DataError, match="made with selection None"):
        prepare(other, workers=1)


# -- The recipe


RECIPE = """
run: x
model: {d_model: 8, n_heads: 2, n_layers: 1, max_seq_len: 8, vocab_size: 300}
tokenizer: {path: t.model}
data: {streams: {a: {path: a}}}
prepare: {source: "delta:tables/x", delta: {version: 3, predicate: "lang = 'en' AND n > 2"}}
train: {steps: 1, global_batch_size: 1}
optimizer: {lr: 1.0e-3}
"""


def test_the_section_survives_freezing_and_its_path_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = loads(RECIPE, "x.yaml")
    assert recipe.prepare is not None
    assert recipe.prepare.delta == Delta(version=3, predicate="lang = 'en' AND n > 2")
    freeze(recipe, tmp_path / "frozen.yaml")
    back = load(tmp_path / "frozen.yaml")
    assert back == absolute(recipe)
    assert back.prepare is not None
    assert back.prepare.source == f"delta:{tmp_path}/tables/x"


def test_all_that_is_wrong_with_it_is_said_at_once() -> None:
    text = RECIPE.replace("version: 3", "version: -1, timestamp: noon").replace("n > 2", "n >")
    with pytest.raises(RecipeError) as caught:
        loads(text, "x.yaml")
    for words in (
        "prepare.delta: has a version and a timestamp",
        "prepare.delta.version: -1 is negative",
        "prepare.delta.timestamp: 'noon' is no time",
        "prepare.delta.predicate: character 20: expected a value",
    ):
        assert words in str(caught.value)


@given(st.text("abn='\"`()<>!, 1.e-%_ANDORTINLKE", max_size=60) | st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_condition_or_none(text: str) -> None:
    with suppress(ValueError):
        assert columns_of(parse_predicate(text))


def test_a_condition_has_bounds() -> None:
    for text in ("(" * 3000 + "n = 1", "NOT " * 900 + "n = 1", "n = 1 " * 2000):
        with pytest.raises(ValueError, match=r"deep|more than|expected"):
            parse_predicate(text)
