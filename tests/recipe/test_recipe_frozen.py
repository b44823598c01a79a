"""A recipe on disk: what is frozen reads back exactly, and a change of it can be named."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt import recipe
from mpt.errors import UsageError
from mpt.recipe import Recipe
from mpt.recipe.data import Stream
from mpt.recipe.frozen import to_yaml
from mpt.recipe.load import loads

TINY = (Path(__file__).parents[1] / "golden" / "recipe.yaml").read_text(encoding="utf-8")


def tiny(*overrides: str) -> Recipe:
    return loads(TINY, "tiny.yaml", overrides)


def frozen(original: Recipe, directory: Path) -> Recipe:
    recipe.freeze(original, directory / "recipe.yaml")
    return recipe.load(directory / "recipe.yaml")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.max_grad_norm=.inf", "model.clip_qkv=6", "prepare=null", "data.eval=null"],
        ["optimizer.lr=0.1234567890123456789", "optimizer.eps=1e-300", "optimizer.lr=5e-324"],
        ["run='1e3'", "tokenizer.path='null'", "train.compile=false"],
        ["run='010'", "seed=9223372036854775807", "data.streams={'1_000': {path: '~'}}"],
        ["run='0x10'", "data.streams={'yes': {path: é 😀}, 'null': {path: a}}", "prepare=null"],
    ],
)
def test_a_frozen_recipe_reads_back_exactly(overrides: list[str], tmp_path: Path) -> None:
    original = tiny(*overrides)
    assert frozen(original, tmp_path) == recipe.absolute(original)
    assert frozen(recipe.absolute(original), tmp_path) == recipe.absolute(original)


@given(
    text=st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1).filter(
        lambda text: "${" not in text
    ),
    number=st.floats(0, exclude_min=True, allow_infinity=False),
)
def test_any_text_and_any_number_survive_the_spelling(text: str, number: float) -> None:
    original = tiny()
    original = replace(
        original,
        tokenizer=replace(original.tokenizer, path=text),
        data=replace(original.data, streams={"a": Stream(path=f"{text}/a", weight=number)}),
        optimizer=replace(original.optimizer, lr=number),
        train=replace(original.train, max_grad_norm=math.inf),
    )
    assert loads(to_yaml(original), "r") == original


def test_paths_become_absolute_and_urls_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    original = tiny(
        "tokenizer.path=~/t.model",
        "data.streams.stdlib.path=s3://bucket/x",
        "data.cache.dir=~/copies",
        "prepare.source=../text",
    )
    got = frozen(original, tmp_path)
    assert got.tokenizer.path == "/home/someone/t.model"
    assert got.data.cache.dir == "/home/someone/copies"
    assert got.data.streams["stdlib"].path == "s3://bucket/x"
    assert got.data.eval is not None
    assert got.data.eval.path == str(tmp_path / "data/stdlib/eval")
    assert got.prepare is not None
    assert got.prepare.source == str(tmp_path.parent / "text")
    assert recipe.absolute(tiny()).prepare == tiny().prepare  # python-stdlib is not a path


def test_a_url_is_frozen_to_the_letter(tmp_path: Path) -> None:
    url = "https://me:word@host/held%20out/../x?sig=a%2Fb"
    held_out = frozen(tiny(f"data.eval.path={url}"), tmp_path).data.eval
    assert held_out is not None
    assert held_out.path == url


def test_a_frozen_recipe_is_complete_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.freeze(tiny("seed=1"), path)

    def broken(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UsageError, match=r"cannot be written: No space left on device\."):
        recipe.freeze(tiny("seed=2"), path)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]
    assert recipe.load(path).seed == 1


def test_who_reads_while_a_recipe_is_frozen_sees_all_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.freeze(tiny("seed=1"), path)
    with path.open() as reader:
        recipe.freeze(tiny("seed=2"), path)
        assert "seed: 1\n" in reader.read()
    assert recipe.load(path).seed == 2


def test_a_recipe_that_would_not_read_back_is_not_frozen(tmp_path: Path) -> None:
    original = tiny()
    for path in ("a\nb", "${seed}", "x" * 5000):
        odd = replace(original, tokenizer=replace(original.tokenizer, path=f"{tmp_path}/{path}"))
        with pytest.raises(UsageError, match="cannot be frozen"):
            recipe.freeze(odd, tmp_path / "recipe.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_recipe_starts_with_one_line_that_says_what_it_is(tmp_path: Path) -> None:
    recipe.freeze(tiny(), tmp_path / "recipe.yaml")
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    assert [line.startswith("#") for line in lines].count(True) == 1
    assert lines[0].startswith("# The recipe of this run")


def test_a_long_value_stays_on_its_line() -> None:
    path = "a b " * 100
    assert f"path: '{path}'" in to_yaml(tiny(f"tokenizer.path='{path}'"))


def test_the_hash_depends_on_what_a_recipe_says_and_not_on_how() -> None:
    spelled = loads(TINY.replace("lr: 1.0e-3", "lr: 0.001") + "launch: {max_restarts: 10}\n", "x")
    assert recipe.recipe_hash(spelled) == recipe.recipe_hash(tiny())
    assert len({recipe.recipe_hash(tiny(f"seed={seed}")) for seed in range(10)}) == 10
    assert len(recipe.recipe_hash(tiny("train.max_grad_norm=.inf"))) == 64


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=17", {}),
        ("train.steps=50", {"train.steps": (300, 50)}),
        ("optimizer.betas=[0.9, 0.99]", {"optimizer.betas": ((0.9, 0.95), (0.9, 0.99))}),
        ("data.streams.stdlib.weight=2", {"data.streams.stdlib.weight": (1.0, 2.0)}),
        ("data.eval=null", {"data.eval.path": ("data/stdlib/eval", None)}),
    ],
)
def test_differences_are_the_keys_that_changed(override: str, expected: dict[str, Any]) -> None:
    assert recipe.differences(tiny(), tiny(override)) == expected
    backwards = {key: (new, old) for key, (old, new) in expected.items()}
    assert recipe.differences(tiny(override), tiny()) == backwards
