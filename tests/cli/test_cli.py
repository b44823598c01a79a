"""The command line in this process: no traceback ever, results on stdout, remarks on stderr."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from mpt.cli.main import main

from mpt.errors import EXIT_DATA, EXIT_DONE, EXIT_USAGE
from mpt.recipe.load import load, loads
from mpt.recipe.machine import this_cpu
from mpt.recipe.premises import premises
from mpt.rundir import CHOSEN, CHOSEN_FORMAT
from tests.data.cases import write_dataset
from tests.recipe.test_recipe_fuzz import damage

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny.yaml"


def mpt(*args: str | Path) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of `mpt`; any exception but SystemExit is a traceback."""
    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["mpt", *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        code = EXIT_DONE
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=damage())
def test_train_on_a_damaged_recipe_never_shows_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.yaml"
    file.write_bytes(text)
    code, out, err = mpt("train", file, "--check")
    assert code in (EXIT_DONE, EXIT_USAGE, EXIT_DATA)
    assert "Traceback" not in err + out
    assert bool(err) == (code != EXIT_DONE), "said why, and only then"


def test_check_prints_the_plan_as_a_table_or_as_json() -> None:
    code, out, err = mpt("train", TINY, "--check", "train.steps=50", "optimizer.lr=3e-4")
    assert (code, err) == (EXIT_DONE, "")
    assert "runs/tiny" in out
    assert "50 steps" in out
    assert "0.0003" in out
    code, out, err = mpt("train", TINY, "--check", "--json", "--nproc", "4", "--run-dir", "x")
    plan = json.loads(out)
    assert plan["world_size"] == 4
    assert plan["run_dir"] == "x"
    assert plan["n_parameters"] > 1_000_000
    here = plan["chosen"][0]
    assert here["by"] == "estimate"
    assert here["chosen"]["microbatch_size"] == 4


def test_check_says_what_decides_and_what_a_run_has_chosen_before(tmp_path: Path) -> None:
    long = ["train.steps=100000", "train.compile=false"]
    check: list[str | Path] = [
        "train",
        TINY,
        "--check",
        "--run-dir",
        tmp_path,
        "--nproc",
        "1",
        *long,
    ]
    assert "timed before the first step" in mpt(*check)[1]
    (told, *_) = json.loads(mpt(*check, "--json")[1])["chosen"]
    assert told["by"] == "probe"
    here = {**premises(load(TINY, long), this_cpu(1), 1), "machine": told["on"]}
    entry = {"premises": here, "chosen": {**told["chosen"], "microbatch_size": 3}}
    (tmp_path / CHOSEN).write_text(json.dumps({"format": CHOSEN_FORMAT, "choices": [entry]}))
    assert "3 samples, as the run has it in chosen.json" in mpt(*check)[1]
    assert "2 samples, as train.microbatch_size" in mpt(*check, "train.microbatch_size=2")[1]


def test_check_says_what_each_stream_comes_to(tmp_path: Path) -> None:
    """Tokens of 100 steps of 16 samples of 256; passes where the data is there."""
    samples = np.zeros((50, 256), np.int64)
    write_dataset(tmp_path / "a", samples)
    text = TINY.read_text()
    file = tmp_path / "two.yaml"
    file.write_text(text.replace("stdlib: {path: data/stdlib/train,", f"a: {{path: {tmp_path}/a,"))
    more = [f"data.streams.b.path={tmp_path}/b", "data.streams.b.weight=3", "prepare=null"]
    code, out, err = mpt("train", file, "--check", "train.steps=100", *more)
    assert (code, err) == (EXIT_DONE, "")
    assert "a 25.0% = 102,400 tokens, 8.00 passes; b 75.0% = 307,200 tokens\n" in out
    code, out, _ = mpt("train", file, "--check", "--json", "train.steps=100", *more)
    assert json.loads(out)["streams"][0] == {
        "name": "a",
        "share": 0.25,
        "tokens": 102_400,
        "passes": 8.0,
    }
    by_size = ["data.streams.a.weight=null", "data.streams.a.repeats=32", "prepare=null"]
    code, out, err = mpt("train", file, "--check", "train.steps=50", *by_size)
    assert code == EXIT_DONE
    assert "a 100.0% = 204,800 tokens, 16.00 passes\n" in out
    assert "ask for 409,600 tokens, but the run reads 204,800 (" in err
    assert "train.steps=100 would fit" in err


def test_all_problems_come_at_once_each_with_its_place(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        TINY.read_text()
        .replace("n_heads:", "n_head:")
        .replace("precision: auto", "precision: bf61")
    )
    code, out, err = mpt("train", bad, "--check", "optimizer.lr=")
    assert code == EXIT_USAGE
    assert not out
    assert f"{bad}:8:3: model.n_head: unknown key; did you mean `n_heads`?" in err
    assert "train.precision: 'bf61' is not one of 'auto', 'bf16', 'fp32'." in err
    assert "command line: optimizer.lr:" in err


def test_a_vocabulary_that_does_not_cover_the_tokenizer_is_a_problem_of_the_recipe(
    tmp_path: Path,
) -> None:
    from mpt.tokenizer import train_tokenizer

    model = tmp_path / "tokenizer.model"
    train_tokenizer([f"some words to learn {i * 7919}" for i in range(400)], model, vocab_size=300)
    arguments: list[str | Path] = ["train", TINY, "--check", f"tokenizer.path={model}"]
    code, _, err = mpt(*arguments, "model.vocab_size=299")
    assert code == EXIT_USAGE
    assert "model.vocab_size: 299 rows do not cover the 300 ids" in err
    assert "384" in err
    assert mpt(*arguments, "model.vocab_size=300")[0] == EXIT_DONE
    model.write_bytes(b"not a tokenizer")
    code, _, err = mpt(*arguments)
    assert code == EXIT_USAGE
    assert "tokenizer.path" in err


def test_version_and_help_answer() -> None:
    assert mpt("--version")[1].startswith("mpt ")
    for command in ([], ["train"], ["data"], ["export"]):
        code, out, _ = mpt(*command, "--help")
        assert code == EXIT_DONE
        assert "Usage" in out


def test_the_recipe_that_the_readme_explains_is_the_one_that_ships() -> None:
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```yaml\n")
    explained = loads(blocks[1].split("```")[0], "README.md")
    assert explained == load(TINY)
