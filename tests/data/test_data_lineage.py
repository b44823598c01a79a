"""Laws of lineage: what a dataset was made of is written with it, shown, checked, and recorded."""

from __future__ import annotations

import importlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpt.data.dataset import content_fault, open_dataset
from mpt.data.hashes import content_hash
from mpt.data.prepare import prepare
from mpt.data.shard import Encoding, ShardInfo
from mpt.errors import DataError
from mpt.recipe.recipe import Recipe
from mpt.storage import hash_file
from mpt.tokenizer import train_tokenizer
from mpt.train import start as starting
from tests.data.cases import recipe_for, some_texts, write_texts, write_tokenizer
from tests.data.faults import compress

command = importlib.import_module("mpt.cli.main")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """With prepared data."""
    write_tokenizer(tmp_path / "tokenizer.model")
    recipe = recipe_for(tmp_path, write_texts(tmp_path / "texts", some_texts(60)))
    prepare(recipe, workers=1)
    return recipe


def shard(name: str, samples: int, sha256: str) -> ShardInfo:
    return ShardInfo(name, 100, samples, Encoding("uint16", 4), {"sha256": sha256})


def test_the_content_hash_is_of_samples_and_order_and_not_of_names_or_compression(
    tmp_path: Path, recipe: Recipe
) -> None:
    a, b = shard("a", 1, "0"), shard("b", 2, "1")
    whole = content_hash([a, b])
    assert whole == content_hash([replace(a, basename="x"), replace(b, basename="y")])
    others = [[b, a], [a], [a, b, b], [replace(a, samples=2), b], [shard("a", 1, "2"), b]]
    assert len({whole, *map(content_hash, others)}) == 6
    assert content_hash([replace(a, hashes={"sha1": "0"}), b]) is None
    before = open_dataset(tmp_path / "train")
    assert before.about is not None
    assert before.about.content_sha256 == content_hash(before.shards)
    after = open_dataset(compress(tmp_path / "train"))
    assert after.index_sha256 != before.index_sha256
    assert content_fault(after) is None


def test_a_dataset_says_what_it_was_made_of_and_inspect_shows_it(
    tmp_path: Path, recipe: Recipe
) -> None:
    result = CliRunner().invoke(
        command.app, ["data", "inspect", str(tmp_path / "train"), "--json", "--samples", "0"]
    )
    shown = json.loads(result.stdout)
    written = json.loads((tmp_path / "train" / "dataset.json").read_text())
    assert written.items() <= shown.items()
    assert shown["source"] == str(tmp_path / "texts")
    assert shown["tokenizer_sha256"] == hash_file(tmp_path / "tokenizer.model")
    assert len(shown["source_version"]) == len(shown["content_sha256"]) == 64
    assert (shown["selection"], shown["curation"]) == (None, None)
    assert shown["created_by"].startswith("mpt ")


def test_descriptions_of_two_datasets_that_were_mixed_up_are_found(
    tmp_path: Path, recipe: Recipe
) -> None:
    shutil.copy(tmp_path / "eval" / "dataset.json", tmp_path / "train")
    result = CliRunner().invoke(command.app, ["data", "verify", str(tmp_path / "train"), "--json"])
    assert result.exit_code == 3
    (fault,) = json.loads(result.stdout)["faults"]
    assert "the two files belong to different datasets" in fault
    with pytest.raises(DataError, match="the two files belong to different datasets"):
        starting._check_data(recipe)


def test_a_run_records_where_its_data_came_from(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "run").mkdir()
    starting._make_ready(recipe, tmp_path / "run", None, print, lambda: nullcontext(lambda _: None))
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    for name, folder in (("only", "train"), ("eval", "eval")):
        written = json.loads((tmp_path / folder / "dataset.json").read_text())
        assert provenance["lineage"][name] == written


def test_training_refuses_data_of_another_tokenizer(tmp_path: Path, recipe: Recipe) -> None:
    other = tmp_path / "other.model"
    train_tokenizer(["other words " * 50], other, vocab_size=270)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(
        "run: x\nmodel: {d_model: 8, n_heads: 2, n_layers: 1, max_seq_len: 16, vocab_size: 300}\n"
        f"tokenizer: {{path: {other}}}\ndata: {{streams: {{a: {{path: {tmp_path}/train}}}}}}\n"
        "train: {steps: 1, global_batch_size: 1}\noptimizer: {lr: 0.001}\n"
    )
    with pytest.raises(DataError, match=r"train: made with the tokenizer of sha256 .*, but the"):
        CliRunner().invoke(
            command.app,
            ["train", str(recipe_file), "--run-dir", str(tmp_path / "run")],
            catch_exceptions=False,
        )


def test_a_source_that_moved_is_refused_with_a_way_out(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "texts").rename(tmp_path / "moved")
    moved = recipe_for(tmp_path, tmp_path / "moved")
    with pytest.raises(DataError, match="or drop `prepare:` to use it as it is"):
        prepare(moved)
    assert prepare(recipe).made == ()  # the source itself is not needed any more


def test_a_description_without_its_keys_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "train" / "dataset.json"
    about = json.loads(path.read_text())
    del about["content_sha256"]
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="content_sha256: is missing; prepare the dataset again"):
        open_dataset(tmp_path / "train")
