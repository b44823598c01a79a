"""Laws of `mpt data`: the result on stdout, the rest on stderr, 3 for bad data, no torch."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from typer.testing import CliRunner

from mpt.data.plan import Progress
from mpt.data.prepare import prepare
from mpt.errors import DataError
from tests.data.cases import recipe_for, some_texts, write_dataset, write_texts, write_tokenizer

command = importlib.import_module("mpt.cli.data")  # mypy knows it as cli.data
app = command.app

RECIPE = """
run: test
model: {{d_model: 8, n_heads: 2, n_layers: 1, max_seq_len: 16, vocab_size: 300}}
tokenizer: {{path: {out}/tokenizer.model}}
data:
  streams: {{only: {{path: {out}/train}}}}
  eval: {{path: {out}/eval}}
prepare: {{source: {source}, eval_fraction: 0.2}}
train: {{steps: 1, global_batch_size: 1}}
optimizer: {{lr: 0.001}}
"""


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_prepare_makes_the_data_of_a_recipe_and_says_what(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", [*some_texts(40), ""])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path / "out", source=texts))
    code, out, err = run("prepare", recipe, "--json", "--workers", 2)
    result = json.loads(out)
    assert code == 0
    assert [Path(path).name for path in result["made"]] == ["tokenizer.model", "train", "eval"]
    assert result["skipped"] == {"empty": 1}
    assert sum(dataset["documents"] for dataset in result["datasets"].values()) == 40
    assert err.splitlines() == ["mpt: training a tokenizer", "mpt: tokenizing"]
    code, out, err = run("prepare", recipe)
    assert (code, err) == (0, "")
    assert out.count("(was there already)") == 3
    with pytest.raises(DataError, match="Delete"):
        run("prepare", recipe, "model.max_seq_len=8")


def test_progress_tells_speed_and_the_time_left_of_this_call_alone() -> None:
    speed = command.Speed()
    before = Progress("resuming", 10, 5_000_000, 900, read_bytes=40, source_bytes=100)
    assert speed.describe(before, 0.0) == "10 documents, 5.0 MB, 900 tokens"
    first = Progress("dataset", 11, 6_000_000, 1000, read_bytes=50, source_bytes=100)
    assert speed.describe(first, 7.0) == "11 documents, 6.0 MB, 1,000 tokens"
    later = Progress("dataset", 12, 26_000_000, 2000, read_bytes=75, source_bytes=100)
    assert speed.describe(later, 17.0).endswith("2,000 tokens, 2.0 MB/s, 0:00:10 left")
    assert speed.describe(replace(later, source_bytes=None), 17.0).endswith("2.0 MB/s")


@pytest.mark.parametrize(
    ("packing", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_the_source_is_read_to_its_last_byte(
    tmp_path: Path, packing: str, pack: Callable[[bytes], bytes]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in some_texts(60)).encode()
    source = tmp_path / f"texts.jsonl{packing}"
    source.write_bytes(pack(lines))
    seen: list[Progress] = []
    prepare(recipe_for(tmp_path / "out", source), progress=seen.append)
    assert seen[-1].source_bytes == source.stat().st_size
    assert seen[-1].read_bytes == source.stat().st_size


def test_the_files_of_a_directory_that_are_not_read_do_not_count(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", some_texts(60))
    size = sum(path.stat().st_size for path in texts.iterdir())
    (texts / "image.png").write_bytes(b"png" * 1000)
    seen: list[Progress] = []
    prepare(recipe_for(tmp_path / "out", texts), progress=seen.append)
    assert seen[-1].source_bytes == seen[-1].read_bytes == size


def test_inspect_shows_counts_and_the_first_samples_as_text(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", [f"\x1b[31mred {i} " * 90 for i in range(9)])
    recipe = recipe_for(tmp_path, texts, eval_fraction=0.5)
    write_tokenizer(tmp_path / "tokenizer.model")
    done = prepare(recipe)
    train = done.streams["only"]
    assert train.about is not None
    code, out, _ = run("inspect", train.path, "--tokenizer", done.tokenizer, "--samples", 1)
    assert code == 0
    assert f"samples          {len(train)}" in out
    assert f"documents        {train.about.documents}" in out
    assert "\\x1b[31mred" in out
    assert "\x1b" not in out
    _, out, _ = run("inspect", train.path, "--json", "--samples", 3)
    shown = json.loads(out)
    assert shown["samples"] == len(train)
    assert [len(sample) for sample in shown["first_samples"]] == [16] * 3


def test_verify_names_the_corrupt_shard_and_exits_with_3(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", np.arange(80).reshape(20, 4))
    assert run("verify", tmp_path / "set") == (0, "3 of 3 shards sound\n", "")
    path = tmp_path / "set" / "shard.00001.mds"
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    code, out, _ = run("verify", tmp_path / "set")
    assert code == 3
    assert f"{path}: corrupt shard" in out
    assert "2 of 3 shards sound" in out
    code, out, _ = run("verify", tmp_path / "set", "--json")
    assert code == 3
    assert len(json.loads(out)["faults"]) == 1


def test_looking_into_a_dataset_needs_no_torch(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", np.arange(80).reshape(20, 4))
    write_tokenizer(tmp_path / "tokenizer.model")
    script = f"""
import sys
from mpt.cli.data import app
assert not {{"torch", "numpy"}} & set(sys.modules)
app(["inspect", {str(tmp_path / "set")!r}, "--tokenizer", {str(tmp_path / "tokenizer.model")!r}],
    standalone_mode=False)
import mpt.data.prepare
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
